"""Small random transformers models, plain and converted, in float64."""

import torch
import transformers

import coda_attn
from coda_attn.modeling import coda_layers, rope_frequencies

VOCABULARY = 97
SMALL = coda_attn.CodaConfig(window=16, chunk=4, exact_slots=8, num_sinks=2, bank_distance=24)
PAPER = coda_attn.CodaConfig.paper(window=16, chunk=4, exact_slots=6, summary_slots=4, tau_exact=0.3)


def plain_model(family="Llama", causal=True, **overrides):
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                 initializer_range=0.2)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **overrides})
    return getattr(transformers, family + ("ForCausalLM" if causal else "Model"))(config).double().eval()


def randomize(model):
    """Gates, lambda and theta as after training, so that every part of the layer matters."""
    generator = torch.Generator().manual_seed(1)
    for layer in coda_layers(model):
        for name, parameter in layer.named_parameters():
            if name.split(".")[0] in ("lambda_proj", "theta", "write_proj", "summary_eta_logit", "head_norm"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.copy_(noise * (0.3 if parameter.dim() > 1 else 0.8))
    return model


def coda_model(config=SMALL, mode="bounded", family="Llama", **overrides):
    return randomize(coda_attn.convert(plain_model(family, **overrides), config, mode))


def no_second_stream(model):
    """lambda = 0 to rounding."""
    for layer in coda_layers(model):
        layer.lambda_proj.bias.data.fill_(-200.0)
    return model


def token_ids(rows, length, seed=3):
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths, seed=3, side="left"):
    """Token ids and attention mask of rows of these lengths."""
    width = max(lengths)
    ids, mask = token_ids(len(lengths), width, seed), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        real = slice(width - length, None) if side == "left" else slice(0, length)
        mask[row, real] = 1
    return ids * mask, mask


def exact_phases(model):
    """A plain model whose rotary module rotates by float64 phases; its own are float32 in any model."""
    inv_freq, scaling = rope_frequencies(model.config)

    def forward(x, position_ids):
        angle = position_ids[..., None].double() * inv_freq
        angle = torch.cat([angle, angle], -1)
        return angle.cos() * scaling, angle.sin() * scaling

    model.model.rotary_emb.forward = forward
    return model
