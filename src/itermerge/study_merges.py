"""Which merge? Rules and policies against the best constant ratio and against vanilla, at equal ID accuracy.

    python -m itermerge.study_merges DIR [DIR ...] --against DIR [DIR ...] --out results/NAME

`DIR` are sweep or run folders, or the --out of an earlier study; after `--against` those that hold the controls, chains
of constant ratios and vanilla, where they are not among the first. Written to --out, and printed:

    chains.jsonl.gz every chain of the first folders: with those of --against all that the tables are made of
    rules.csv       levels at the last round: each rule; constant ratios and vanilla at the same learning rate
    merges.csv      each rule against each of its controls
    summary.csv     the same in short
    merges.md       all of that, and what it says
    *.png           change of OOD near against change of ID, and the differences to the controls

A *rule* here is any setting that is neither vanilla nor linear with a constant ratio and the base as anchor: the rule,
the policy of its ratio, its ratio and learning rate. A *cell* is a setting at a round. Fixed before looking at test
items:

- Each rule is taken at the last round, as it was run: neither its round nor its parameters are chosen.
- (a) *best constant ratio*: of the constant cells (any ratio, learning rate and round) whose mean ID validation
  accuracy is at most a point from the rule's the one with the smallest drift. OOD has no validation items in these
  runs, so what chooses is the norm of the weights' change, as in `study`.
- (a') *nearest constant ratio*: of the constant ratios at the rule's learning rate and the last round the one with the
  nearest ID validation accuracy, however far that is (it is said); of equals the smaller drift.
- (b) *vanilla*: of vanilla's cells (any learning rate and round) within a point the one with the smallest drift.
- (b') *vanilla at equal drift*: of vanilla's cells whose drift is within 15% the one with the nearest drift.

A method that chooses on validation items itself (early stopping) has a validation accuracy that is too high, and so
controls that have learned more: this speaks against it.

Where no cell is near enough there is no control, and that stands there. (a) and (b) choose among many cells, and a
rule is one, at one learning rate: a rule that loses may win elsewhere; one that wins here beats a tuned control.

Differences are paired by item, seed and base, over the units that all settings have, with the intervals of `study`.
Dozens of comparisons are made, so some intervals leave 0 by chance: p is the bootstrap's, and p (Holm) corrects it for
all rules and both sides of OOD against one control. With three bases or seeds such a p is somewhat too small (such
intervals cover the truth in 82 to 98% of cases, see `study`): p (Holm) below .05 is necessary, not sufficient; look at
how many units have the sign. A rule *keeps more* (less) when p (Holm) is below .05 and ID is not less (more) by its
interval.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .report import charts
from .study import (
    CHAINS,
    EQUAL_ID,
    Cell,
    Interval,
    Method,
    Study,
    StudyError,
    find,
    interval,
    markdown,
    methods_of,
    neutral,
    paired,
    write_csv,
)  # fmt: skip

BEST, NEAREST, VANILLA = "best constant ratio", "nearest constant ratio", "vanilla"
DRIFT = "vanilla at equal drift"
CONTROLS = (BEST, NEAREST, VANILLA, DRIFT)
ALPHA = 0.05
SIDES = ("OOD near", "OOD far")


@dataclass(frozen=True)
class Against:
    """A rule at the last round against one control: its differences by group; no control, no differences."""

    kind: str
    rule: Cell
    control: Cell | None
    found: dict[str, Interval]


def is_constant(method: Method) -> bool:
    """Whether a method is linear with a constant ratio and the base as anchor."""
    chain = next(iter(method.chains.values()))
    plain = all(str(chain.merge(key)) == str(value) for key, value in neutral().items())
    return (
        not (method.vanilla or method.named or method.rule) and plain and chain.merge("merge.anchor") in (None, "base")
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the smallest times their number, the next times one less, never falling, at most 1."""
    out, least = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        out[i] = least
    return out


class Merges:
    """The tables of the rules in a study. Raises StudyError where it has no rule, or no constant ratio."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.constants = [m for m in study.methods if is_constant(m)]
        self.rules = [m for m in study.methods if not m.vanilla and m not in self.constants]
        if not self.rules:
            raise StudyError("no chains of a merge rule or a policy; constant ratios alone: python -m itermerge.study")
        if not self.constants:
            raise StudyError("no chains of a constant ratio (merge=linear) to compare with; name them after --against")
        self.sides = [g for g in SIDES if g in study.groups]

    def label(self, method: Method) -> str:
        """A rule's name, without ratio and learning rate where it was run at one."""
        short = method.rule or method.other * method.named
        alike = sum((m.rule or m.other * m.named) == short for m in self.rules)
        return short if alike == 1 and short else method.name

    def control(self, kind: str, rule: Method) -> Cell | None:
        """The control of a rule; None where no cell is within a point of its ID validation accuracy, or within 15% of
        its drift."""
        study, at = self.study, (rule, rule.at(self.study.rounds))
        pool = [m for m in (study.vanilla if kind in (VANILLA, DRIFT) else self.constants) if m.other == rule.like]
        if kind != NEAREST:
            match = study.equal_drift if kind == DRIFT else study.equal_id
            return match(at, [(m, t) for m in pool for t in range(1, study.rounds + 1)])
        cells = [(m, study.rounds) for m in pool if m.lr == rule.lr]
        return min(cells, key=lambda c: (self._apart(at, c), c[0].mean("weights/drift", c[1])), default=None)

    def _apart(self, a: Cell, b: Cell) -> float:
        return round(abs(a[0].mean("val/id/acc", a[1]) - b[0].mean("val/id/acc", b[1])), 9)

    @cached_property
    def compared(self) -> list[Against]:
        """Each rule against each of its controls."""
        found = []
        for kind in CONTROLS:
            for rule in self.rules:
                at, control = (rule, rule.at(self.study.rounds)), self.control(kind, rule)
                pairs = [(at, control)] if control is not None else []
                gaps = {g: self.study.against(pairs, g) for g in ("ID", *self.sides) if pairs}
                found.append(Against(kind, at, control, gaps))
        return found

    @cached_property
    def adjusted(self) -> dict[tuple[str, str, str], float]:
        """{(control, rule, side of OOD): p (Holm)}: corrected over all rules and sides against one control."""
        out = {}
        for kind in CONTROLS:
            own = [(a, g) for a in self.compared if a.kind == kind and a.control for g in self.sides]
            values = holm([a.found[g].p for a, g in own])
            out |= {(kind, a.rule[0].name, g): p for (a, g), p in zip(own, values, strict=True)}
        return out

    # --- tables ------------------------------------------------------------------------------------------------

    def levels(self) -> list[dict[str, Any]]:
        """rules.csv: the base, each rule, and constant ratios and vanilla at the rules' learning rates; last round."""
        study, rates = self.study, {m.lr for m in self.rules}
        shown = [*self.rules, *(m for m in (*self.constants, *study.vanilla) if m.lr in rates)]
        rows = [self._level("base", study.vanilla[0], 0)]
        return rows + [self._level(m.name, m, study.rounds) for m in shown]

    def _level(self, name: str, m: Method, number: int) -> dict[str, Any]:
        row: dict[str, Any] = {"method": name, "ratio asked": f"{self.asked(m):.2f}" if number else ""}
        row["val ID"] = f"{100 * m.mean('val/id/acc', number):.1f}"
        row |= {g: self.study.value(m, number, g).percent() for g in ("ID", *self.sides)}
        return row | {"drift": f"{m.mean('weights/drift', number):.4f}" if number else ""}

    def asked(self, method: Method) -> float:
        """The ratio that was asked for, mean over weights, rounds and units (of model stock, what its own is times)."""
        rounds = range(1, method.at(self.study.rounds) + 1)
        return float(np.mean([c.rounds[t].get("merge/ratio", c.ratio) for c in method.chains.values() for t in rounds]))

    def rows(self) -> list[dict[str, Any]]:
        """merges.csv: each rule against each of its controls."""
        rows = []
        for a in self.compared:
            row: dict[str, Any] = {"against": a.kind, "rule": a.rule[0].name}
            if a.control is None:
                near = "15% of its drift" if a.kind == DRIFT else "a point of ID (validation)"
                rows.append({**row, "control": f"none within {near}"})
                continue
            row["control"] = f"{a.control[0].name}, round {a.control[1]}"
            for what, figure, scale, digits in (("val ID", "val/id/acc", 100, 1), ("drift", "weights/drift", 1, 4)):
                row[what] = " / ".join(f"{scale * m.mean(figure, t):.{digits}f}" for m, t in (a.rule, a.control))
            row |= {group: gap.points() for group, gap in a.found.items()}
            for side in self.sides:
                row[f"p {side}"] = f"{a.found[side].p:.3f}"
                row[f"p (Holm) {side}"] = f"{self.adjusted[a.kind, a.rule[0].name, side]:.3f}"
            apart = self._apart(a.rule, a.control)
            row["note"] = f"{100 * apart:.1f} points of ID (validation) apart" if apart > EQUAL_ID + 1e-9 else ""
            rows.append(row)
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """summary.csv: a row a rule, with ID and OOD near against the best constant ratio and against vanilla, for
        named methods at equal drift as well."""
        rows = []
        for rule in self.rules:
            row: dict[str, Any] = {"rule": self.label(rule), "ratio asked": f"{self.asked(rule):.2f}"}
            row["val ID"] = f"{100 * rule.mean('val/id/acc', self.study.rounds):.1f}"
            row["drift"] = f"{rule.mean('weights/drift', self.study.rounds):.4f}"
            for kind in (BEST, VANILLA, *((DRIFT,) if any(m.named for m in self.rules) else ())):
                (a,) = [a for a in self.compared if a.kind == kind and a.rule[0] is rule]
                row |= {f"{g} - {kind}": a.found[g].points() if a.control else "none near" for g in self._short}
            rows.append(row)
        return rows

    @property
    def _short(self) -> tuple[str, ...]:
        return ("ID", *self.sides[:1])

    def said(self) -> list[str]:
        """What the comparisons come to, a sentence a control; then the units."""
        out = []
        for kind in CONTROLS:
            own = [a for a in self.compared if a.kind == kind]
            have = [a for a in own if a.control]
            lines = [f"**Against {kind}**: {len(have)} of {len(own)} rules have a control."]
            for side in self.sides if have else ():
                gaps = [(a, a.found[side], self.adjusted[kind, a.rule[0].name, side]) for a in have]
                sure = [(a, gap) for a, gap, p in gaps if p < ALPHA]
                more = [self.label(a.rule[0]) for a, gap in sure if gap.value > 0 and a.found["ID"].high >= 0]
                less = [self.label(a.rule[0]) for a, gap in sure if gap.value < 0 and a.found["ID"].low <= 0]
                above, below = sum(gap.low > 0 for _, gap, _ in gaps), sum(gap.high < 0 for _, gap, _ in gaps)
                equal = "drift" if kind == DRIFT else "ID"
                lines.append(
                    f"{side}: keeps more at equal {equal}: {', '.join(more) or 'none'}; keeps less: "
                    f"{', '.join(less) or 'none'} (uncorrected, {above} intervals are above 0 and {below} below)."
                )
            out.append(" ".join(lines))
        number = sum(len(self.sides) for a in self.compared if a.control)
        units = self.study.units
        bases, seeds = (sorted({u[i] for u in units}, key=str) for i in (0, 1))
        return [
            *out,
            f"{number} comparisons of OOD in all; each p (Holm) is corrected for all against its control.",
            f"Round {self.study.rounds}, {len(units)} units: bases {', '.join(map(str, bases))}; seeds "
            f"{', '.join(map(str, seeds))}.",
        ]

    # --- figures -----------------------------------------------------------------------------------------------

    def change(self, method: Method, number: int, group: str, resamples: int | None = None) -> Interval:
        """The change since the base, paired by item."""
        now, base = ({u: c.correct[t] for u, c in method.chains.items()} for t in (method.at(number), 0))
        return interval(paired(now, base, self.study.groups[group]), resamples)

    def _point(self, method: Method, number: int, series: str, side: str) -> dict[str, Any]:
        row: dict[str, Any] = {"series": series, "name": f"{method.name}, round {method.at(number)}"}
        for axis, group in (("x", "ID"), ("y", side)):
            gap = self.change(method, number, group, None if method in self.rules else 1)
            row |= {axis: 100 * gap.value, f"low_{axis}": 100 * gap.low, f"high_{axis}": 100 * gap.high}
        return row

    def frontier(self) -> charts.Figure:
        """Change of OOD near (far, where there is no near) against change of ID since the base."""
        study, side, last = self.study, self.sides[0], self.study.rounds
        rates = sorted({m.lr for m in self.rules})
        points = []
        for m in self.rules:
            series = "policies of the linear ratio" if m.rule.startswith("linear") else "merge rules"
            series = series if m.rule else "other methods"
            points.append(self._point(m, last, series, side) | {"label": self.label(m)})
        lines = {m.lr: "constant ratios" + (f", lr {m.lr:g}" if len(rates) > 1 else "") for m in self.rules}
        curves, dust = [], []
        for m in (*self.constants, *study.vanilla):
            series = "vanilla, by learning rate" if m.vanilla else lines.get(m.lr, lines[rates[0]])
            dust += [self._point(m, t, series, side) for t in range(1, last + (not m.vanilla))]
            if m.vanilla or m.lr in rates:
                said = f"vanilla, lr {m.lr:g}" if m.vanilla else f"ratio {m.ratio:g}"
                at = m.lr if m.vanilla else m.ratio
                curves.append(self._point(m, last, series, side) | {"at": at, "label": said, "shown": not m.vanilla})
        greens = dict(zip(lines.values(), (charts.GREEN, charts.SKY, charts.PURPLE, charts.ORANGE), strict=False))
        colours = {"merge rules": charts.BLUE, "policies of the linear ratio": charts.VERMILLION, **greens}
        colours = {"other methods": charts.PURPLE if len(rates) < 3 else "#9A7B00", **colours}
        colours |= {"vanilla, by learning rate": charts.GREY}
        colours = {k: v for k, v in colours.items() if k in {row["series"] for row in (*points, *curves)}}
        panel = charts.named(
            points, curves, dust, colours, x="ID accuracy: change since the base (points)",
            y=f"{side} accuracy: change since the base (points)",
        )  # fmt: skip
        caption = (
            f"Round {last}, {len(study.units)} units; bars: 95%, paired with the base, as far as there is room.\n"
            f"Lines: constant ratios at lr {' and '.join(f'{r:g}' for r in rates)}, and vanilla over learning rates. "
            "Dots: their other cells (learning rates, rounds)."
        )
        return charts.Figure("frontier", [panel], colours, columns=1, caption=caption)

    def against(self) -> charts.Figure:
        """Differences in OOD to the best constant ratio and to vanilla, at equal ID, a row a rule."""
        panels = []
        shown = [a.found[side] for a in self.compared if a.kind != NEAREST and a.control for side in self.sides]
        ends = [0.0, *(100 * end for gap in shown for end in (gap.low, gap.high))]
        limits = min(ends) - 0.3, max(ends) + 0.3
        for kind in (BEST, VANILLA):
            for side in self.sides:
                rows = [
                    {
                        "name": self.label(a.rule[0]), "series": side, "value": 100 * a.found[side].value,
                        "low": 100 * a.found[side].low, "high": 100 * a.found[side].high,
                    }
                    for a in self.compared if a.kind == kind and a.control
                ]  # fmt: skip
                colours = {"OOD near": charts.NEAR, "OOD far": charts.FAR}
                if rows:
                    title = f"{side}, minus {kind} at equal ID"
                    panels.append(charts.dots(title, rows, colours, x="points", form=".1f", rule=0.0, limits=limits))
        caption = "Paired by item, seed and base; bars: 95%, not corrected for their number."
        return charts.Figure("against", panels, columns=len(self.sides), caption=caption)


TABLES = {
    "summary": "In short: differences in points, mean [95%] units with its sign",
    "merges": "Each control",
    "rules": "Levels, in %",
}


def tables(merges: Merges) -> dict[str, list[dict[str, Any]]]:
    """The tables by the name of their file."""
    return {"summary": merges.summary(), "merges": merges.rows(), "rules": merges.levels()}


def text(merges: Merges, made: dict[str, list[dict[str, Any]]]) -> str:
    """merges.md."""
    parts = ["# Which merge?", "", *(f"- {line}" for line in merges.said())]
    for name, rows in made.items():
        parts += ["", f"## {TABLES[name]}", "", markdown(rows)]
    return "\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m itermerge.study_merges", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folders", type=Path, nargs="+", help="sweep or run folders, or an earlier study's --out")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], help="folders of controls, whose chains stay there"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables and figures")
    parser.add_argument("--rounds", type=int, help="the round to compare at (default: the last that all chains have)")
    args = parser.parse_args(argv)
    try:
        ours, unfinished = find(args.folders)
        theirs, _ = find(args.against)
        study = Study(methods_of([*ours, *theirs]), args.rounds)
        merges = Merges(study)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    kept = sorted({chain.line() for _, chain in ours})
    (args.out / CHAINS).write_bytes(gzip.compress("".join(kept).encode(), mtime=0))
    made = tables(merges)
    for name, rows in made.items():
        write_csv(args.out / f"{name}.csv", rows)
    (args.out / "merges.md").write_text(said := text(merges, made))
    print(said, end="")
    if study.left_out:
        units = ", ".join(f"base {base} seed {seed}" for base, seed in study.left_out)
        print(f"\nleft out, since not every method has them: {units}")
    if unfinished:
        print(f"\n{len(unfinished)} runs are not finished, and missing above: {', '.join(unfinished)}")
    charts.write_png(merges.frontier(), args.out / "frontier.png")
    if (figure := merges.against()).panels:
        charts.write_png(figure, args.out / "against.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
