"""Schemes of coupled halves: RevNet and Hamiltonian networks."""

from __future__ import annotations

from dataclasses import dataclass, field

from odenets.schemes.reversible import CoupledHalves

__all__ = ["Hamiltonian", "RevNet"]


@dataclass(frozen=True)
class RevNet(CoupledHalves):
    """RevNet's blocks: ``y1 = x1 + h F(x2)`` and ``y2 = x2 + h G(y1)``, with x1 and x2 the halves of dimension 1.

    A block has the two fields, of half the channels, which come in turns. It is undone by ``x2 = y2 - h G(y1)`` and
    ``x1 = y1 - h F(x2)``. With h = 1 these are the published blocks. Where all layers of a network are undone, as with
    :class:`~odenets.schemes.SpaceToDepth` between flows and :class:`~odenets.schemes.InjectivePadding` before them, it
    is an i-RevNet.
    Reference: Gomez, Ren, Urtasun, Grosse. The reversible residual network. NeurIPS 2017, arXiv:1707.04585;
    Jacobsen, Smeulders, Oyallon. i-RevNet. ICLR 2018, arXiv:1802.07088.

    Args:
        reversible: as in :class:`~odenets.schemes.ReversibleScheme`.

    >>> import odenets, torch
    >>> flow, x = odenets.Flow(odenets.MLPField(2), solver=RevNet(), depth=3), torch.randn(5, 4)
    >>> flow.evaluations, torch.allclose(flow.inverse(flow(x)), x, atol=1e-5)
    (6, True)
    """

    name: str = field(init=False, repr=False, default="revnet")

    @property
    def uses(self) -> tuple[int, ...]:
        """Two fields, each once."""
        return (1, 1)

    def couplings(self) -> tuple[tuple[int, float, float, int], ...]:
        """The first half by F, the second by G."""
        return (0, 1.0, 0.0, 0), (1, 1.0, 0.0, 1)


@dataclass(frozen=True)
class Hamiltonian(CoupledHalves):
    """Hamiltonian networks: ``Y' = F(Z)`` and ``Z' = -G(Y)`` with Y and Z the halves of dimension 1.

    With gradients for fields, as of symmetric layers ``K^T s(K x + b)``, this is Hamilton's system of
    ``H = S(K1 Z + b1) + S(K2 Y + b2)``, S the sum of an antiderivative of s; where weights are the same in all blocks,
    states neither grow nor shrink with depth. Fields of the other sign, ``-K^T s(K x + b)``, make the system of -H.

    * "euler", symplectic Euler, of order 1: ``Y1 = Y + h F(Z)``, ``Z1 = Z - h G(Y1)``;
    * "verlet", of order 2: Y over h / 2, Z over h, Y over h / 2 with the same F.

    A block has the two fields, of half the channels, which come in turns.
    Reference: Haber, Ruthotto. Stable architectures for deep neural networks. Inverse Problems 2017, arXiv:1705.03341;
    Chang, Meng, Haber, Ruthotto, Begert, Holtham. Reversible architectures for arbitrarily deep residual
    neural networks. AAAI 2018, arXiv:1709.03698.

    Args:
        form: "euler" or "verlet".
        reversible: as in :class:`~odenets.schemes.ReversibleScheme`.

    Raises:
        ValueError: another form.

    >>> import odenets
    >>> odenets.Flow(odenets.MLPField(2), solver=Hamiltonian("verlet"), depth=3).evaluations
    9
    """

    name: str = field(init=False, repr=False, default="hamiltonian")
    form: str = "euler"

    def __post_init__(self) -> None:
        if self.form not in ("euler", "verlet"):
            raise ValueError(f"form must be 'euler' or 'verlet', got {self.form!r}")
        verlet = self.form == "verlet"
        object.__setattr__(self, "name", "hamiltonian_verlet" if verlet else "hamiltonian")
        super().__post_init__()
        object.__setattr__(self, "order", 1 + verlet)

    @property
    def uses(self) -> tuple[int, ...]:
        """F once or twice, G once."""
        return (1 + (self.form == "verlet"), 1)

    def couplings(self) -> tuple[tuple[int, float, float, int], ...]:
        """The first half by F, the second by -G."""
        if self.form == "euler":
            return (0, 1.0, 0.0, 0), (1, -1.0, 0.0, 1)
        return (0, 0.5, 0.0, 0), (1, -1.0, 0.5, 2), (0, 0.5, 1.0, 1)
