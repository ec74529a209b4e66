"""What things are called: roles of operands, GEMMs by their results, and sites.

A *site* is one operand of one matrix product. Its name is the same in every process and on every
rank, in a run log, an explanation and a page.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Role = Literal["input", "weight", "grad_output"]
ROLES: tuple[Role, ...] = get_args(Role)
Gemm = Literal["output", "grad_input", "grad_weight"]
GEMMS: tuple[Gemm, ...] = get_args(Gemm)


@dataclass(frozen=True, order=True)
class SiteName:
    """One operand of one matrix product.

    Attributes:
        fqn: Dotted name of the product: that of its module, or of module and parameter where a
            module has several; empty for the model itself.
        role: Which operand.
    """

    fqn: str
    role: Role

    def __str__(self) -> str:
        return f"{shown(self.fqn)} {self.role}"

    def to_dict(self) -> dict[str, str]:
        """Return the name as JSON has it: its two fields."""
        return {"fqn": self.fqn, "role": self.role}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the name that a dict holds; other keys are ignored.

        Raises:
            ValueError: A role that there is not, or a name that is no text.
        """
        fqn, role = data["fqn"], data["role"]
        if not isinstance(fqn, str) or role not in ROLES:
            raise ValueError(f"expected the fqn and role of a site, got {fqn!r} and {role!r}")
        return cls(fqn, role)


def is_attention_name(name: str) -> bool:
    """Whether a product's name, or a glob for some, ends as those of attentions do, or heads of it.

    Example:
        >>> [is_attention_name(n) for n in ("0.attn.qk", "0.attn.pv.3", "*.qk.*", "0.attn.q_proj")]
        [True, True, True, False]
    """
    parts = [part for part in name.split(".")[-2:] if part != "*" and not part.isdigit()]
    return bool(parts) and parts[-1] in ("qk", "pv")


def shown(fqn: str) -> str:
    """Return a product's name for people: the empty one is that of the model itself."""
    return fqn or "(the model itself)"
