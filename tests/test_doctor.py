"""The doctor's answers are those of this build, and a probe that raises is one of them."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from oracles import ML_DTYPES
from patience import PATIENCE_S
from unclamp.doctor import DeviceAnswer, Diagnosis, probe_cast, probe_device
from unclamp.doctor.casts import every_bfloat16, fate, fate_of_ties, reference_codes
from unclamp.doctor.device import accumulation
from unclamp.doctor.sentences import sentences
from unclamp.formats import E4M3FN, E5M2, FORMATS
from unclamp.numerics import cast
from unclamp.numerics.cast import torch_dtype
from unclamp.report.doctor import diagnosis_view

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
each_source = pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def cpu() -> DeviceAnswer:
    return probe_device("cpu")


def printed(devices: list[DeviceAnswer], width: int = 160) -> str:
    found = Diagnosis(build={"torch": "2"}, devices=tuple(devices), warnings=())
    out = io.StringIO()
    Console(file=out, width=width).print(diagnosis_view(found.to_dict()))
    return out.getvalue()


def direct(values: list[float], source: torch.dtype, fmt) -> list[float]:
    return torch.tensor(values, dtype=source).to(torch_dtype(fmt)).float().tolist()


def word(got: list[float], top: float) -> str:
    if all(math.isnan(g) for g in got):
        return "gives NaN"
    return {math.inf: "gives Inf", top: "saturates"}[got[0]] if got[0] == -got[1] else "?"


@each_format
@each_source
def test_fates_are_those_of_a_direct_cast(fmt, source) -> None:
    answer = probe_cast(fmt, source, "cpu")
    assert answer.finite_overflow == word(direct([1e30, -1e30], source, fmt), fmt.max)
    assert answer.inf == word(direct([math.inf, -math.inf], source, fmt), fmt.max)
    assert answer.nan == word(direct([math.nan, math.nan], source, fmt), fmt.max)
    assert answer.error is None


@each_format
@each_source
def test_counts_are_those_of_a_direct_cast_and_of_ml_dtypes(fmt, source) -> None:
    answer = probe_cast(fmt, source, "cpu")
    bits = np.arange(0x10000, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    finite = bits[np.isfinite(bits)]
    x = torch.from_numpy(finite).to(source)
    assert len(finite) == 65_280
    nonfinite = torch.count_nonzero(~x.to(torch_dtype(fmt)).float().isfinite())
    assert answer.nonfinite == int(nonfinite)
    codes = x.clamp(-fmt.max, fmt.max).to(torch_dtype(fmt)).view(torch.uint8).numpy()
    oracle = finite.clip(-fmt.max, fmt.max).astype(ML_DTYPES[fmt.name]).view(np.uint8)
    assert answer.clamped_differ == np.count_nonzero(codes != oracle) == 0


@each_format
def test_reference_codes_are_those_of_the_production_cast(fmt) -> None:
    x = every_bfloat16()
    numbers = ~x.isnan()
    codes = cast(x, 1.0, fmt).view(torch.uint8).long()
    assert torch.equal(codes[numbers], reference_codes(fmt)[numbers])


def test_this_range_of_torch_casts_as_we_believe(cpu: DeviceAnswer) -> None:
    """Fails when torch changes: then the table in the docs and the essay of `cast` change too."""
    old = torch.__version__ < "2.13"  # pytorch#178817; torch compares versions, not text
    fates = {
        "e4m3fn": ("gives NaN", "gives NaN", 30_510) if old else ("saturates", "saturates", 0),
        "e5m2": ("gives Inf", "gives Inf", 28_704),
        "e4m3fnuz": ("gives NaN", "gives NaN", 30_736),
        "e5m2fnuz": ("gives NaN", "gives NaN", 28_704),
    }
    for answer in cpu.casts:
        assert (answer.finite_overflow, answer.inf, answer.nonfinite) == fates[answer.format]
        assert (answer.nan, answer.ties, answer.clamped_differ) == ("gives NaN", "to even", 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([448.0, -448.0], "saturates"),
        ([448.0, 448.0], "gives mixed values"),
        ([448.0, math.nan], "gives mixed values"),
        ([math.inf, -math.inf], "gives Inf"),
        ([math.nan, math.nan], "gives NaN"),
    ],
)
def test_fate_of_planted_results(values: list[float], words: str) -> None:
    x = torch.tensor([1e30, -1e30])
    assert fate(torch.tensor(values), x, x.isfinite(), E4M3FN) == words


@each_format
def test_planted_rounding_of_ties_is_recognised(fmt) -> None:
    x = every_bfloat16().float()
    grid = torch.tensor([fmt.decode(code) for code in range(fmt.max_code + 1)])
    up = grid[torch.searchsorted(grid, x.nan_to_num(0)).clamp(max=fmt.max_code)]
    assert fate_of_ties(up, fmt) == "away from zero"
    assert fate_of_ties(cast(x, 1.0, fmt).float(), fmt) == "to even"
    even_but_one = cast(x, 1.0, fmt).float()
    even_but_one[x == fmt.min_subnormal / 2] = fmt.min_subnormal
    assert fate_of_ties(even_but_one, fmt) == "mixed"


def accepts(a: torch.Tensor, b: torch.Tensor, use_fast_accum: bool = False) -> bool:
    tensorwise, one = F.ScalingType.TensorWise, torch.ones(1)
    try:
        F.scaled_mm(a, b, one, tensorwise, one, tensorwise, use_fast_accum=use_fast_accum)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def test_matmul_cases_are_those_of_a_direct_call(cpu: DeviceAnswer) -> None:
    answers = {answer.case: answer.outcome == "accepted" for answer in cpu.matmul}
    e4m3, e5m2 = (torch.ones(16, 48).to(torch_dtype(f)) for f in (E4M3FN, E5M2))
    assert answers["per-tensor scales"] == accepts(e4m3, e4m3.t())
    assert answers["e5m2 x e5m2"] == accepts(e5m2, e5m2.t())
    assert answers["K not a multiple of 16"] == accepts(e4m3[:, :40], e4m3[:, :40].t())
    assert answers["row-major second operand"] == accepts(e4m3, e4m3.t().contiguous())
    assert answers["use_fast_accum"] == accepts(e4m3, e4m3.t(), use_fast_accum=True)
    assert len(answers) == 4 + 16 + 1


def test_a_probe_that_raises_is_the_answer() -> None:
    """A meta tensor has no data to read, and torch checks its products as a GPU's."""
    meta = probe_device("meta")
    assert {(c.finite_overflow, c.inf, c.nan, c.ties) for c in meta.casts} == {
        ("not supported",) * 4
    }
    assert all("NotImplementedError" in (c.error or "") for c in meta.casts)
    assert {m.outcome for m in meta.matmul} == {"rejected"}
    said = " ".join(sentences([meta]))
    assert "casts to e4m3fn, e5m2, e4m3fnuz, e5m2fnuz are not supported" in said
    assert "takes nothing" in said
    assert "not supported" in printed([meta])


def test_wrong_codes_after_the_clamp_come_first(cpu: DeviceAnswer) -> None:
    assert "do not trust" not in " ".join(sentences([cpu]))
    wrong = replace(cpu, casts=(replace(cpu.casts[0], clamped_differ=3), *cpu.casts[1:]))
    assert "3 codes of e4m3fn from float32" in next(sentences([wrong]))


def test_devices_that_cast_differently_are_named(cpu: DeviceAnswer) -> None:
    twin = replace(cpu, device="cuda")
    assert "differ" not in " ".join(sentences([cpu, twin]))
    other = replace(twin, casts=(replace(cpu.casts[0], inf="gives Inf"), *cpu.casts[1:]))
    assert "Plain casts to e4m3fn from float32 differ" in " ".join(sentences([cpu, other]))


def test_sentences_follow_from_what_was_accepted(cpu: DeviceAnswer) -> None:
    strict = replace(cpu, matmul=tuple(replace(m, outcome="rejected") for m in cpu.matmul))
    assert "Hopper GPU rejects" not in " ".join(sentences([strict]))
    lax = replace(cpu, matmul=tuple(replace(m, outcome="accepted") for m in cpu.matmul))
    assert "Hopper GPU rejects (e5m2 x e5m2, K not" in " ".join(sentences([lax]))


def test_missing_numba_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    accumulation.cache_clear()
    assert accumulation().startswith("not available: ModuleNotFoundError")
    accumulation.cache_clear()


def test_sources_share_a_row_unless_they_differ(cpu: DeviceAnswer) -> None:
    assert printed([cpu]).count("fp32, bf16") == 4
    split = replace(cpu, casts=(replace(cpu.casts[0], nonfinite=7), *cpu.casts[1:]))
    assert printed([split]).count("fp32, bf16") == 3


def test_a_few_rejected_pairs_are_named(cpu: DeviceAnswer) -> None:
    assert "16 of 16" in printed([cpu])
    gpu = tuple(
        replace(m, outcome="rejected") if m.case == "e5m2 x e5m2" else m for m in cpu.matmul
    )
    lines = [" ".join(line.split()) for line in printed([replace(cpu, matmul=gpu)]).splitlines()]
    assert "format pairs: accepted 15 of 16" in lines
    assert "format pairs: rejected e5m2 x e5m2" in lines


def unclamp_doctor(*arguments: str) -> str:
    command = [sys.executable, "-m", "unclamp", "doctor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    said = [line for line in done.stderr.splitlines() if "compiling the CPU kernels" not in line]
    assert (done.returncode, said) == (0, [])
    return done.stdout


def test_json_is_one_document_with_stable_keys(cpu: DeviceAnswer) -> None:
    found = json.loads(unclamp_doctor("--json"))
    assert list(found) == ["build", "devices", "warnings", "paragraph"]
    assert {"unclamp", "python", "torch", "cuda", "numpy", "numba", "triton"} <= set(found["build"])
    assert found["devices"][0] == json.loads(json.dumps(cpu.to_dict()))
    assert list(found["devices"][0]["casts"][0]) == [
        "format", "source", "finite_overflow", "inf", "nan", "ties", "nonfinite",
        "clamped_differ", "error",
    ]  # fmt: skip
    assert list(found["devices"][0]["matmul"][0]) == ["case", "outcome", "detail"]


def test_printed_answer_names_formats_and_what_follows() -> None:
    text = unclamp_doctor()
    assert all(name in text for name in FORMATS)
    assert "what follows" in text
