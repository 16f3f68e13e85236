"""The report in words."""

from __future__ import annotations

from compiled import compiled

from repquant_fx.report import checked, summary


def test_what_frightens_is_told_to_those_who_ask() -> None:
    """Codes that part in a free run are no error: what is judged comes first, and the rest with `verbose`."""
    at_tie = {"share": 0.25, "share_step": 0.0, "largest_step": 1}
    flipped = {"share": 0.25, "share_step": 0.001, "largest_step": 1}
    named = {"runtime": "ONNX Runtime", "reference": "the FX reference"}
    parity = {**named, "output_sqnr": 40.0, "mean_share": 0.25, "quantizers": {"one": at_tie}}
    assert checked(parity).endswith("0 codes differ but for values midway between two codes")
    worse = {**named, "quantizers": {"one": at_tie, "two": flipped}}
    assert checked(worse).endswith("at most 0.1 % of the codes differ")
    report = {**compiled("vit", 4).report, "parity": parity}
    plain, verbose = summary(report), summary(report, verbose=True)
    assert "25" not in plain.partition("checked in ONNX Runtime")[2] and "free running" not in plain
    assert "output 40.0 dB, 25.0000 % of the codes differ" in verbose and verbose.startswith(plain.splitlines()[0])
