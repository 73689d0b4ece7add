"""Every command: its JSON, its exit status, and what it says about bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from coda_attn import CodaConfig
from coda_attn.cli import cli, main, options
from coda_attn.modeling import coda_layers

TINY = "random:mistral-tiny"

COMMANDS = ("demo", "convert", "calibrate", "generate", "eval ppl", "memory")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(coda, command):
    result = coda(*command.split(), "--help")
    assert result.status == 0
    examples = [line.split() for line in result.out.splitlines() if line.startswith(f"    coda {command}")]
    assert examples
    for example in examples:
        node, arguments = cli, example[1:]
        while hasattr(node, "commands"):
            node, arguments = node.commands[arguments[0]], arguments[1:]
        assert node.make_parser(node.context_class(node)).parse_args(arguments)


def test_no_command_prints_help(coda):
    result = coda()
    assert result.status == 0
    assert all(command.split()[0] in result.out for command in COMMANDS)


def test_ppl_json(coda, text):
    result = coda("eval", "ppl", "--model", TINY, "--text", text, "--lengths", "100,600", "--max-tokens", 1300, "--json")
    assert result.status == 0
    rows = result.json["rows"]
    assert [(row["policy"], row["length"]) for row in rows] == [
        (policy, length) for policy in ("full", "window", "bounded") for length in (100, 600)]
    for row in rows:
        assert row["tokens"] == {100: 13 * 99, 600: 2 * 599}[row["length"]]
        assert 200 < row["ppl"] < 330  # a random model over 258 tokens
        assert row["slots"] == (row["length"] if row["policy"] == "full" else 384)
    assert [row["state_bytes"] for row in rows[:2]] == [2 * 2 * 2 * 16 * 4 * length for length in (100, 600)]
    assert rows[4]["state_bytes"] == rows[5]["state_bytes"]


def test_ppl_reads_one_sequence_longer_than_max_tokens(coda, text):
    result = coda("eval", "ppl", "--model", TINY, "--text", text, "--lengths", 3000, "--max-tokens", 50, "--policy", "bounded", "--json")
    assert result.json["rows"][0]["tokens"] == 2999


def test_ppl_table(coda, text):
    result = coda("eval", "ppl", "--model", TINY, "--text", text, "--lengths", "300", "--policy", "full,bounded")
    assert result.status == 0
    assert [line.split()[0] for line in result.out.splitlines()] == ["policy", "full", "bounded"]


def test_convert_saves_what_loads(coda, tmp_path):
    folder = tmp_path / "converted"
    result = coda("convert", "--model", TINY, "--output", folder, "--mode", "full", "--window", 64, "--chunk", 16,
                  "--exact-slots", 24, "--bank-distance", "none", "--no-differential", "--json")
    assert result.status == 0
    assert result.json["slots"] == 88
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.coda_mode == "full"
    assert coda_layers(model)[0].coda == CodaConfig(window=64, chunk=16, exact_slots=24, bank_distance=None, differential=False)
    again = coda("eval", "ppl", "--model", folder, "--lengths", 200, "--max-tokens", 200, "--policy", "bounded", "--json")
    assert again.json["rows"][0]["slots"] == 88


def test_convert_leaves_nothing_after_bad_input(coda, tmp_path):
    result = coda("convert", "--model", TINY, "--output", tmp_path / "converted", "--gate", tmp_path / "missing.safetensors")
    assert result.status == 2
    assert list(tmp_path.iterdir()) == []


def test_calibrate_changes_what_is_kept(coda, tmp_path, text):
    gate = tmp_path / "gate.safetensors"
    result = coda("calibrate", "--model", TINY, "--output", gate, "--text", text, "--rows", 2, "--row-length", 900, "--json")
    assert result.status == 0
    card = json.loads((tmp_path / "gate.json").read_text())
    assert {**card, "gate": str(gate), "card": str(tmp_path / "gate.json")} == result.json
    assert card["rows"] == {"source": str(text), "count": 2, "length": 900, "seed": None}
    assert len(card["layers"]) == 2
    ask = ("eval", "ppl", "--model", TINY, "--text", text, "--lengths", 1500, "--policy", "bounded", "--json", "--gate")
    assert coda(*ask, gate).json["rows"][0]["ppl"] != coda(*ask, "none").json["rows"][0]["ppl"]


def test_generate_json_and_streaming_agree(coda):
    ask = ("generate", "--model", TINY, "--prompt", "abc" * 300, "--max-new-tokens", 8, "--temperature", 1.0, "--seed", 3)
    result = coda(*ask, "--json")
    assert result.status == 0
    assert (result.json["prompt_tokens"], result.json["new_tokens"]) == (900, 8)
    assert coda(*ask).out.rstrip("\n") == result.json["text"].rstrip("\n")


def test_generate_memory(coda):
    ask = ("generate", "--model", TINY, "--max-new-tokens", 2, "--json")
    bounded = [coda(*ask, "--prompt", "x" * n).json["state_bytes"] for n in (10, 1000)]
    full = [coda(*ask, "--policy", "full", "--prompt", "x" * n).json["state_bytes"] for n in (10, 1000)]
    assert bounded[0] == bounded[1]
    assert full == [2 * 2 * 2 * 16 * 4 * n for n in (11, 1001)]


def test_memory_json(coda):
    result = coda("memory", "--shape", "mistral-7b", "--lengths", "1024,32768", "--json")
    assert result.status == 0
    full, longer, bounded, same = (row["state_bytes"] for row in result.json["rows"])
    assert longer == 32 * full == 2 * 32 * 8 * 128 * 2 * 32768
    assert bounded == same
    # keys and values, and gates and positions beside them
    assert 1 < bounded / (2 * 32 * 8 * 128 * 2 * 384) < 1.02


def test_memory_of_a_model_and_overrides(coda):
    assert coda("memory", "--model", TINY, "--json").json["shape"] == {"layers": 2, "kv_heads": 2, "head_dim": 16}
    assert coda("memory", "--layers", 5, "--head-dim", 64, "--json").json["shape"] == {"layers": 5, "kv_heads": 8, "head_dim": 64}


def test_demo(coda, tmp_path):
    result = coda("demo", "--model", TINY, "--out", tmp_path / "out", "--json")
    assert result.status == 0
    assert json.loads((tmp_path / "out" / "coda-demo.json").read_text()) == result.json
    assert (tmp_path / "out" / "coda-demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(result.json["rows"]) == 9
    assert result.json["generation"]["prompt_tokens"] >= 4000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["coda-demo.json", "coda-demo.png"]


def test_every_memory_field_is_an_option():
    @options.memory_options
    def command(memory):
        return options.memory_config(memory)

    names = {parameter.name for parameter in command.__click_params__}
    assert names == {"preset", *(f"memory_{name}" for name in CodaConfig().to_dict())}


def test_preset_and_policy_options(coda):
    def config(*arguments):
        return coda("memory", "--lengths", 10, "--json", *arguments).json["rows"][1]["slots"]

    assert config("--preset", "large") == 768
    assert config("--preset", "paper-medium", "--summary-slots", 0) == 320
    assert options.memory_config({"preset": None, "fields": {"policy": "novelty_lru", "gates": "shared"}}).gate_bias is False


@pytest.mark.parametrize("arguments, said", [
    (["nothing"], "No such command"),
    (["memory", "--nothing"], "No such option"),
    (["memory", "--lengths", "12,x"], "'x' is not a valid integer"),
    (["memory", "--lengths", "0"], "at least 1 token"),
    (["memory", "--layers", "0"], "layers=0"),
    (["memory", "--model", TINY, "--shape", "mistral-7b"], "give one of them"),
    (["memory", "--window", "100"], "chunk=32 does not divide window=100"),
    (["memory", "--summary-slots", "8"], "gates='shared'"),
    (["memory", "--model", "no/such/folder"], "is not a folder"),
    (["eval", "ppl", "--model", TINY, "--lengths", "1"], "at least 2 tokens"),
    (["eval", "ppl", "--model", TINY, "--policy", "bounded,best"], "'best' is not one of"),
    (["eval", "ppl", "--model", TINY, "--text", "no-such-file"], "No such file"),
    (["eval", "ppl", "--model", TINY, "--lengths", "99999999"], "99999999 tokens were asked, but the text has only"),
    (["eval", "ppl", "--model", TINY, "--device", "nowhere"], "is not a device"),
    (["eval", "ppl", "--model", TINY, "--gate", "no-such-file"], "cannot read gates"),
    (["eval", "ppl", "--model", TINY, "--preset", "paper-medium", "--lengths", "64"], "without summary slots"),
    (["generate", "--model", TINY], "--prompt-file"),
    (["generate", "--model", TINY, "--prompt", ""], "empty"),
    (["generate", "--model", TINY, "--prompt", "a", "--prompt-file", "b"], "one of them"),
    (["generate", "--model", TINY, "--prompt", "a", "--max-new-tokens", "0"], "x>=1"),
    (["convert", "--model", TINY], "--output"),
    (["convert", "--model", TINY, "--output", "/"], "exists"),
    (["convert", "--model", TINY, "--output", "/proc/none/here"], "cannot write"),
    (["calibrate", "--model", TINY, "--output", "/proc/gate.safetensors", "--row-length", "200"], "no room for"),
    (["demo", "--model", "no/such/folder", "--json"], "is not a folder"),
])
def test_bad_input_is_one_line_and_status_2(coda, arguments, said):
    result = coda(*arguments)
    assert result.status == 2
    assert result.out == ""
    # Notes on what is being done may come before it.
    *notes, line = result.err.splitlines()
    assert line.startswith("coda: error: ") and not any("error" in note for note in notes)
    assert said in line


def test_text_shorter_than_asked(coda, text):
    result = coda("demo", "--model", TINY, "--text", _shortened(text), "--out", text.parent / "out")
    assert result.status == 2
    assert "2048 tokens were asked, but the text has only 500 tokens" in result.err


def _shortened(text):
    text.write_text(text.read_text()[:500])
    return text


def test_text_that_is_not_utf8(coda, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    result = coda("eval", "ppl", "--model", TINY, "--text", path)
    assert result.status == 2
    assert "not UTF-8" in result.err


def test_a_fault_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(options, "print_json", lambda value: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(["memory", "--json"])


def test_as_a_process():
    ask = [sys.executable, "-m", "coda_attn.cli", "memory"]
    good = subprocess.run([*ask, "--json"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["rows"]
    bad = subprocess.run([*ask, "--window", "0"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert bad.stderr.startswith("coda: error: window=0")


def test_bfloat16(coda, text):
    row = coda("eval", "ppl", "--model", TINY, "--text", text, "--dtype", "bfloat16", "--lengths", "400",
               "--policy", "bounded", "--max-tokens", 400, "--json").json["rows"][0]
    assert row["ppl"] > 0
    assert torch.bfloat16.itemsize * 2 * 2 * 2 * 16 * 384 < row["state_bytes"]
