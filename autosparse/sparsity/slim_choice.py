"""Which units can go: those that nobody listens to, or that say the same whatever the image is."""

from __future__ import annotations

import numpy as np

from autosparse.sparsity.slim_graph import CONVOLUTIONS, op_name
from autosparse.sparsity.slim_rules import Rules, Site
from autosparse.sparsity.slim_units import STAYS, Positions, padded


class Choice:
    """The units that stay.

    To begin with all go but those that some operator needs whole. A unit comes back where a sum
    that stays needs one of its channels, until nothing changes: the largest set of units that can
    go together. Then some come back, so that convolutions have channels by the `multiple`; these
    fill up what nobody needs, so they bring no others back.
    """

    def __init__(self, rules: Rules, multiple: int = 1) -> None:
        self.units = rules.units
        self.stays = np.zeros(len(rules.units.parent), dtype=bool)
        self.stays[STAYS] = True
        self.fills = np.zeros_like(self.stays)
        self._parts: dict[int, tuple[int, ...]] = {}
        sites = [(site, self._table(site.reads), self._rows(site)) for site in rules.sites]
        axes = {p.tobytes(): p for dims in rules.dims.values() for p in _all(dims)}
        tables = [self._table(positions) for positions in axes.values()]
        channels = {
            positions.tobytes(): self._table(positions)
            for node, dims in rules.dims.items()
            if op_name(node) in CONVOLUTIONS and (positions := dims[1]) is not None
        }
        while (
            sum(self._listen(*each) for each in reversed(sites))
            or self._fill(tables)
            or any(self._round(each, multiple) for each in channels.values())
        ):
            pass  # Every site listens once more.

    def kept(self, positions: Positions) -> np.ndarray | None:
        """Return the places along a dimension that stay, or None where all do."""
        if positions is None:
            return None
        stay = self._staying(self._table(positions))
        return None if stay.all() else np.flatnonzero(stay)

    def staying(self, positions: np.ndarray) -> np.ndarray:
        """Return bool, like `positions`: which of them stay."""
        return self._staying(self._table(positions))

    def _staying(self, table: np.ndarray) -> np.ndarray:
        return np.asarray(self.stays[table].all(1))

    def _table(self, positions: np.ndarray) -> np.ndarray:
        """Return a row per position: the units that all have to stay, filled up with `STAYS`."""
        parts = []
        for unit in positions.tolist():
            if unit not in self._parts:
                self._parts[unit] = self.units.parts(unit)
            parts.append(self._parts[unit])
        return padded(parts, len(parts))

    def _rows(self, site: Site) -> np.ndarray | None:
        return None if site.gives is None else self._table(site.gives)

    def _listen(self, site: Site, reads: np.ndarray, rows: np.ndarray | None) -> bool:
        """Bring back the units that a site needs; return whether there were any."""
        count = 0 if site.used is None else site.used.shape[0] * site.used.shape[1]
        rows_stay = np.ones(count, dtype=bool) if rows is None else self._staying(rows)
        if rows is not None:
            rows_stay &= ~self.fills[rows].any(1)  # Nobody reads what they give.
        needed = site.needed(rows_stay) & ~site.can_go & ~self._staying(reads)
        self.stays[reads[needed]] = True
        return bool(needed.any())

    def _fill(self, tables: list[np.ndarray]) -> bool:
        """Bring the first unit of a dimension back that would be left without any."""
        for table in tables:
            if len(table) and not self._staying(table).any():
                self.stays[table[0]] = True
                return True
        return False

    def _round(self, table: np.ndarray, multiple: int) -> bool:
        """Bring the first units of a dimension back whose number is no multiple.

        Not where two units have to stay for a place, as around grouped convolutions.
        """
        stay = self._staying(table)
        alone = np.flatnonzero(~stay & ((table != STAYS).sum(1) == 1))
        missing = alone[: -int(stay.sum()) % multiple]
        self.stays[table[missing]] = True
        self.fills[table[missing]] = table[missing] != STAYS
        return bool(len(missing))


def _all(dims: object) -> list[np.ndarray]:
    if isinstance(dims, np.ndarray):
        return [dims]
    return [each for inner in dims for each in _all(inner)] if isinstance(dims, list) else []
