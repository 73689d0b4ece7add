from __future__ import annotations

import random
import re

import pytest
import torch

from coda_attn.calibration_rows import WORDINGS, calibration_rows, make_facts
from coda_attn.evaluation import default_text, library_docs, wiki_summaries
from coda_attn.models import random_mistral_tiny

PROSE = [f"Passage {i} begins here. It goes on for a while, with {i} words! And it ends." for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return random_mistral_tiny()[1]


def test_wordings_are_many_and_of_both_kinds():
    assert len({w.statement for w in WORDINGS}) == len(WORDINGS) >= 14
    kinds = {w.answer for w in WORDINGS}
    assert {"number", "code", "price"} & kinds and {"word", "name", "place", "colour"} & kinds
    for w in WORDINGS:
        assert "{a}" in w.statement and "{s}" in w.statement and "{s}" in w.question and "{a}" not in w.question


def test_what_retrieval_is_tested_with_is_left_out():
    table = " ".join(w.statement + w.question for w in WORDINGS).lower()
    assert not re.search(r"pass ?(key|word|code)|needle|magic|secret|remember|memori[sz]e|keep in mind", table)


def test_facts_differ():
    for seed in range(50):
        facts = make_facts(random.Random(seed), 9)
        assert len({fact.question for fact in facts}) == 9
        assert all(fact.answer in fact.statement for fact in facts)


def test_rows(tokenizer):
    rows = calibration_rows(tokenizer, 6, 3000, seed=5, prose=PROSE)
    assert rows.shape == (6, 3000) and rows.dtype == torch.int64
    texts = [tokenizer.decode(row) for row in rows]
    assert len(set(texts)) == 6
    for text in texts:
        asked = [w for w in WORDINGS if re.search(re.escape(w.question).replace(r"\{s\}", ".{3,40}?"), text)]
        assert 5 <= len(asked) <= 9
        for w in asked:
            subject = re.search(re.escape(w.question).replace(r"\{s\}", "(.{3,40}?)"), text)
            fact = re.escape(w.statement).replace(r"\{s\}", re.escape(subject[1])).replace(r"\{a\}", "([^.]{1,40}?)")
            stated = re.search(fact, text)
            assert stated.start() < subject.start()
            assert stated[1].strip() in text[subject.end():]
        assert "Passage" in text


def test_the_seed_decides(tokenizer):
    first, same, other = (calibration_rows(tokenizer, 2, 2500, seed=seed, prose=PROSE) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_by_default_encyclopedia_and_documentation_take_turns(tokenizer):
    rows = [tokenizer.decode(row) for row in calibration_rows(tokenizer, 4, 3000)]
    wiki, docs = "\n".join(wiki_summaries()), "\n".join(library_docs())
    for i, row in enumerate(rows):
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", row) if len(s) > 30]
        shares = [sum(s in text for s in sentences) / len(sentences) for text in (wiki, docs)]
        assert shares[i % 2] > 0.3 and shares[1 - i % 2] < 0.1


def test_what_is_evaluated_is_not_calibrated_on():
    def runs(text):
        words = re.findall(r"\w+", text)
        return {tuple(words[i:i + 12]) for i in range(len(words) - 11)}

    evaluated = runs(default_text())
    assert not any(evaluated & runs(text) for text in library_docs())


@pytest.mark.parametrize("arguments, said", [
    (dict(rows=0), "at least 1"),
    (dict(rows=1, length=300), "no room for"),
    (dict(rows=100, length=2500), "prose is too short"),
    (dict(rows=1, facts=(99, 99)), "99 facts"),
])
def test_refusals(tokenizer, arguments, said):
    with pytest.raises(ValueError, match=said):
        calibration_rows(tokenizer, prose=PROSE[:20], **arguments)
