"""Batches of rows that differ, on every host: each row's ids are those of `generate` for it alone, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import shake
from host_toys import IMAGE, TOYS
from test_hosts import fwd2bot

from llava_fwd2bot.processing.batched import Answer, run

SILENT = SimpleNamespace(decode=lambda ids, **options: "")


@pytest.mark.parametrize("host", TOYS)
def test_rows_are_as_alone_on_every_host(host):
    """Crops make n differ; k differs by row, also within one; a run that is left goes on."""
    toy = TOYS[host](torch.float64)
    model = shake(fwd2bot(toy), 3)
    with torch.inference_mode():
        S = [model.compress(**toy.some(i))[0] for i in range(3)]
    rows = [([1, IMAGE, 5, 6, 7], [S[0]]), ([1, 9, 10], []), ([1, 12, IMAGE, 13, IMAGE, 14], [S[1], S[2]])]
    alone = []
    for ids, summaries in rows:
        ids = torch.tensor([ids])
        given = {"summary": torch.stack(summaries)} if summaries else {}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, **given)
        alone.append(out[0, ids.shape[1] :].tolist())
    rows.append(([1, 8, IMAGE, 4], [S[2][:2]]))
    answers = [Answer(torch.tensor(ids), summaries, SILENT, max_new_tokens=9) for ids, summaries in rows]
    rest = run(model, answers, lambda going, steps: steps >= 4)
    while rest:
        rest = run(model, rest)
    assert [answer.tokens for answer in answers[:3]] == alone
    one = Answer(torch.tensor(rows[3][0]), rows[3][1], SILENT, max_new_tokens=9)
    run(model, [one])
    assert one.tokens == answers[3].tokens
    assert len({tuple(answer.tokens) for answer in answers}) == 4
