"""What goes wrong between an amax and the scale that is multiplied by; and with time."""

import torch

from unclamp.traps.trap import Between, Documented, Trap


def bfloat16_times_scale(device):
    """Scale a bfloat16 tensor by float32 scales, as it is and in float32."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 16, generator=seeded).bfloat16().to(device)
    scale, differ = torch.ones((), device=device), []
    for amax in torch.linspace(4.5, 6, 16, device=device):
        scale = 448 / amax
        wrong = (x * scale).to(torch.float8_e4m3fn).float()
        right = (x.float() * scale).to(torch.float8_e4m3fn).float()
        differ.append((wrong != right).float().mean().item())
    return {
        "dtype of x * scale": str((x * scale).dtype),
        "dtype of x * scale[None]": str((x * scale[None]).dtype),
        "codes that differ": sum(differ) / len(differ),
    }


def floor_of_log2(device):
    """Take the exponent of the float32 just below each of 200 powers of two."""
    powers = 2.0 ** torch.arange(-100, 100, device=device)
    below = torch.nextafter(powers, torch.zeros_like(powers))
    exponent = torch.floor(torch.log2(below))
    right = torch.frexp(below).exponent - 1
    amax = 448 / below  # whose scale is to be the power below 448 / amax
    largest = amax * torch.exp2(torch.floor(torch.log2(448 / amax)))
    return {
        "numbers": len(below),
        "wrong exponents": int((exponent != right).sum()),
        "tensors scaled beyond 448": int((largest > 448).sum()),
        "and beyond 464": int((largest > 464).sum()),
    }


def subnormal_scale(device):
    """Cast a tiny amax and back, as it is and with denormals flushed."""
    amax = torch.tensor(2e-36, device=device)
    scale = 448 / amax
    scale_inv = 1 / scale
    code = (amax * scale).clamp(max=448).to(torch.float8_e4m3fn).float()
    facts = {
        "scale_inv is normal": str(bool(scale_inv >= 2.0**-126)),
        "back / amax": (code * scale_inv / amax).item(),
    }
    torch.set_flush_denormal(True)
    try:
        facts["back / amax, flushing"] = (code * scale_inv / amax).item()
    finally:
        torch.set_flush_denormal(False)
    facts["scale of amax 1e-37"] = (448 / (amax / 20)).item()
    return facts


def half_precision_scale(device):
    """Make the scale of a small float16 tensor in float16, and cast with it."""
    x = torch.tensor([0.0, 1e-4, 5e-4], dtype=torch.float16, device=device)
    scale = 448 / x.abs().max()
    codes = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    facts = {f"code of x[{i}]": code.item() for i, code in enumerate(codes)}
    return {"scale": scale.item()} | facts


def one_inf_in_the_amax(device):
    """Scale a tensor that holds one Inf by its own plain amax."""
    x = torch.linspace(-1, 1, 1000, device=device)
    x[0] = float("inf")
    scale = 448 / x.abs().max()
    codes = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    is_lost = (codes.float() / scale).isnan()
    return {"scale": scale.item(), "NaN after the way back": int(is_lost.sum())}


def delayed_history(device):
    """Scale each step by the largest amax of the four before; one jumps."""
    amaxes, clamped, coarse = [1.0, 1.0, 1.0, 10.0] + [1.0] * 6, [], []
    for step, amax in enumerate(amaxes):
        scale = 448 / max(amaxes[max(0, step - 4) : step] or [amax])
        x = torch.linspace(0, amax, 1000, device=device)
        codes = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        back = codes.float() / scale
        lost = ((x - back).square().sum() / x.square().sum()).item()
        clamped += [(step, lost)] if amax * scale > 464 else []
        coarse += [step] if amax * scale < 100 else []
    ((step, lost),) = clamped
    return {
        "clamps at step": step,
        "squares lost there": lost,
        "later steps scaled for the jump": len(coarse),
    }


TRAPS = (
    Trap(
        name="bfloat16-scale",
        belief="bfloat16 times a float32 scale is float32.",
        truth="A 0-dim tensor does not promote: `x * scale` stays bfloat16 and is rounded "
        "before the cast; with one axis the scale would promote.",
        experiment=bfloat16_times_scale,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected={
                    "dtype of x * scale": "torch.bfloat16",
                    "dtype of x * scale[None]": "torch.float32",
                    "codes that differ": Between(low=0.015, high=0.06),
                }
            ),
        ),
        cost="Some percent of the codes are one step off, in every cast, unseen.",
        remedy="Casts convert to float32 before they multiply.",
        see="docs/scaling.md",
        telling="codes that differ",
    ),
    Trap(
        name="floor-log2",
        belief="`floor(log2(amax))` is the exponent of amax.",
        truth="log2 rounds: just below a power of two it gives the whole number above, so the "
        "exponent is one too large. A scale that is made of it is wrong by a factor of two: it "
        "puts amax above the largest value, or wastes a bit of range.",
        experiment=floor_of_log2,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected={
                    "numbers": 200,
                    "wrong exponents": Between(low=150, high=200),
                    "tensors scaled beyond 448": Between(low=100, high=200),
                    "and beyond 464": 0,
                }
            ),
        ),
        cost="Power-of-two scales put the largest element past 448, by so little that it rounds "
        "back; where a check is strict it is counted or refused, and the other way a bit is lost.",
        remedy="Scales are rounded down by their bits; the tests hold every one to exact "
        "arithmetic.",
        see="docs/scaling.md",
        telling="wrong exponents",
    ),
    Trap(
        name="subnormal-scale",
        belief="A scale and its inverse are ordinary numbers.",
        truth="An amax of 2e-36 has a subnormal scale_inv: where denormals are flushed, the whole "
        "tensor comes back as 0; for 1e-37 the scale itself is Inf.",
        experiment=subnormal_scale,
        documented=(
            Documented(
                expected={
                    "scale_inv is normal": "False",
                    "back / amax": 1.0,
                    "back / amax, flushing": 0.0,
                    "scale of amax 1e-37": "inf",
                }
            ),
        ),
        cost="Gradients that are tiny but alive become exactly 0 on one machine and not on "
        "another.",
        remedy="A scale is kept in [2^-126, 2^126], so that it and its inverse are normal.",
        see="docs/scaling.md",
        telling="back / amax, flushing",
    ),
    Trap(
        name="float16-scale",
        belief="A scale can be computed in the tensor's own dtype.",
        truth="In float16 448 / 5e-4 is Inf: zeros become NaN and everything else clamps.",
        experiment=half_precision_scale,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected={
                    "scale": "inf",
                    "code of x[0]": "nan",
                    "code of x[1]": 448.0,
                    "code of x[2]": 448.0,
                }
            ),
        ),
        cost="One small float16 tensor poisons the step, or with a clamp on top trains on "
        "constants.",
        remedy="Amaxes, scales and their inverses are float32 whatever the tensor is.",
        see="docs/scaling.md",
    ),
    Trap(
        name="inf-in-the-amax",
        belief="One Inf costs one element.",
        truth="It makes the amax Inf and the scale 0, so that the way back divides 0 by 0: the "
        "whole tensor is NaN. In a history it does so for as long as the window is.",
        experiment=one_inf_in_the_amax,
        devices=("cpu", "cuda"),
        documented=(Documented(expected={"scale": 0.0, "NaN after the way back": 1000}),),
        cost="One overflow loses a tensor, and with delayed scaling every tensor of the window.",
        remedy="An amax is taken over finite elements; an Inf or NaN leaves no trace in a history.",
        see="docs/scaling.md",
        telling="NaN after the way back",
    ),
    Trap(
        name="delayed-history",
        belief="A scale from the last steps fits this one.",
        truth="The step at which the amax jumps is cast with the old scale and clamped; the scale "
        "then stays small for as long as the history remembers.",
        experiment=delayed_history,
        devices=("cpu", "cuda"),
        documented=(
            Documented(
                expected={
                    "clamps at step": 3,
                    "squares lost there": Between(low=0.7, high=0.76),
                    "later steps scaled for the jump": 4,
                }
            ),
        ),
        cost="At a jump of ten times 73 % of the squares are gone, in the one step that needed "
        "them.",
        remedy="Guarded scaling repeats the cast that would clamp; the ledger counts what delayed "
        "scaling clamped, and `unclamp explain` says whether it mattered.",
        see="docs/scaling.md",
        telling="squares lost there",
    ),
)
