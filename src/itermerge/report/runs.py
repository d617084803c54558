"""The report of one run: what its folder says, section by section, and what is missing from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts
from .charts import Figure, signed
from .folders import STATES, Line, Run, flat, in_order, is_vanilla, number, read_lines, round_of, rows_of, task_of
from .page import Block, Charts, Note, Page, Pre, Samples, Section, Tile, embed, p_value, percent

PANELS = {
    "id/acc": ("in-domain (ID)", charts.ID), "ood/near/acc": ("out-of-domain, near", charts.NEAR),
    "ood/far/acc": ("out-of-domain, far", charts.FAR),
}  # fmt: skip
ESTIMATORS = ("skip", "taylor", "block_influence", "angular")  # the order of their panels
ROWS_SHOWN = 150  # samples a round and set
LONGEST = 2000  # characters of a completion
BUDGET = 3_000_000  # bytes of all samples of a page


def page(run: Run) -> Page:
    """The page of a run folder."""
    config = flat(run.config)
    title = describe(config) if config else run.folder.name
    state = "ok" if run.state == "DONE" else "bad" if run.state in ("FAILED", "REPLACED") else "open"
    said = STATES[run.state] + (f": {run.why}" if run.why else "")
    planned = number(config, "rounds")
    notes = [Note(b, warn=True) for b in run.broken]
    there = {round_of(line, i) for i, line in enumerate(run.rounds)}
    if planned is not None and (without := [t for t in range(int(planned) + 1) if t not in there]):
        written = f"of rounds 0 to {planned:.0f}, {'none is' if not there else _list(there) + ' are'} written"
        notes.append(Note(f"{written}; {_list(without)} missing here", warn=True))
    failed = run.summary.get("analysis_failed")
    for where, message in failed.items() if isinstance(failed, dict) else []:
        notes.append(Note(f"the analysis of {where} failed: {message}", warn=True))
    sections = [accuracy(run), importance(run), change(run), diversity(run), samples(run), about(run)]
    return Page(title, _subtitle(config), state, said, tiles(run), notes, sections)


def _list(rounds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(rounds)))


def describe(config: Mapping[str, Any]) -> str:
    """What a run is, from its flat config: the merge, its ratio, learning rate and seed."""
    kind, ratio = config.get("merge.kind"), config.get("merge.ratio")
    policy = config.get("merge.policy.kind", "constant")
    merge = f"merge={kind} ratio={ratio}" + (f" policy={policy}" if policy != "constant" else "")
    merge = "vanilla self-training (merge=none)" if kind == "none" else merge
    return f"{merge}, lr={config.get('sft.lr')}, seed={config.get('seed')}"


def _subtitle(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    model = config.get("model.path") or config.get("model.kind")
    return (
        f"model {model}; task {task_of(config)}, {config.get('task.n_train')} problems a round, "
        f"{config.get('sampler.n')} samples each; {config.get('rounds')} round{'s' * (config.get('rounds') != 1)}; "
        f"{config.get('suite.n')} test items a task"
    )


def tiles(run: Run) -> list[Tile]:
    """Base and final figures."""
    if not run.rounds:
        return []
    base, final = run.rounds[0], run.rounds[-1]
    out = [
        _pair(base, final, name, label)
        for name, label in (
            ("id/acc", "ID"),
            ("ood/acc", "OOD"),
            ("ood/near/acc", "OOD near"),
            ("ood/far/acc", "OOD far"),
        )
    ]
    if (gap := number(final, "gap/superficiality")) is not None:
        low, high = (number(final, f"gap/superficiality{end}") for end in ("_low", "_high"))
        known = low is not None and high is not None
        said = f"[{signed(100 * low, '+.1f')}, {signed(100 * high, '+.1f')}] " if known else ""  # pyright: ignore
        out.append(Tile("superficiality gap", signed(100 * gap, "+.1f"), f"{said}points: ID gain minus OOD gain"))
    out.append(_pair(base, final, "sample/pass@1", "pass@1"))
    entropy = [number(line, "diversity/token_entropy") for line in (base, final)]
    if entropy[0] is not None and entropy[1] is not None:
        out.append(Tile("token entropy", f"{entropy[0]:.2f} → {entropy[1]:.2f}", "nats a token, own samples"))
    best = number(run.summary, "best_round_by_validation")
    if best is not None and 0 <= int(best) < len(run.rounds):
        accuracy = number(run.rounds[int(best)], "val/id/acc")
        out.append(Tile("best round", f"{best:.0f}", f"by validation: {percent(accuracy)}"))
    return [tile for tile in out if tile]


def _pair(base: Line, final: Line, name: str, label: str) -> Any:
    """base -> final of an accuracy; None where one is missing."""
    was, now = number(base, name), number(final, name)
    if was is None or now is None:
        return None
    return Tile(label, f"{100 * was:.1f} → {100 * now:.1f}%", f"{signed(100 * (now - was), '+.1f')} points")


def points(rounds: Sequence[Line], name: str, series: str, scale: float = 100) -> list[dict[str, Any]]:
    """A metric's rows for `charts.curves`: a row a round, None where a round lacks it or is itself lacking; no rows
    where all lack it."""
    lines = {round_of(line, i): line for i, line in enumerate(rounds)}
    rows = []
    for t in range(min(lines, default=0), max(lines, default=-1) + 1):
        value, low, high = (
            None if (v := number(lines.get(t, {}), name + end)) is None else round(scale * v, 6)
            for end in ("", "_low", "_high")
        )
        rows.append({"x": t, "series": series, "value": value, "low": low, "high": high})
    return rows if any(r["value"] is not None for r in rows) else []


def _base_level(rounds: Sequence[Line], name: str, series: str, scale: float = 100) -> list[dict[str, Any]]:
    value = number(rounds[0], name) if round_of(rounds[0], 0) == 0 else None
    return [] if value is None else [{"series": series, "value": scale * value, "what": "base"}]


def missing(rows: Sequence[Mapping[str, Any]], what: str) -> list[Block]:
    """A note that names the rounds without a value."""
    gone = [str(r["x"]) for r in rows if r["value"] is None]
    return [Note(f"no {what} in round {', '.join(gone)}: a gap in the line", warn=True)] if gone else []


# --- accuracy -------------------------------------------------------------------------------------------------------


def accuracy(run: Run) -> Section:
    """ID and OOD over rounds, the single OOD tasks, and the gaps."""
    blocks: list[Block] = []
    panels, legend = [], {}
    for name, (title, colour) in PANELS.items():
        if rows := points(run.rounds, name, title):
            blocks += missing(rows, title)
            legend[title] = colour
    for name, (title, _) in PANELS.items():
        if title in legend:
            levels = _base_level(run.rounds, name, title)
            panels.append(
                charts.curves(
                    title, points(run.rounds, name, title), legend, y="accuracy (%)", levels=levels, legend=False
                )
            )
    if panels:
        caption = "band: 95% interval over test items; dotted: the base"
        blocks.insert(0, Charts(Figure("id_ood", panels, caption=caption)))
    else:
        blocks.append(Note("no accuracy yet: rounds.jsonl holds no round with one", warn=True))
    if figure := tasks(run.rounds):
        blocks.append(Charts(figure, "The tasks one by one", folded=True))
    if figure := gaps(run.rounds):
        blocks.append(Charts(figure, "Gaps"))
    return Section("accuracy", "Accuracy", blocks)


def tasks(rounds: Sequence[Line]) -> Figure | None:
    """A panel a task: its accuracy, and the base's and the majority baseline's as dotted lines."""
    if not rounds:
        return None
    names = {}
    for name in (n for line in rounds for n in line if n.endswith("/acc") and n.count("/") == 2):
        where, task, _ = name.split("/")
        if where in ("id", "ood") and task not in ("near", "far"):
            names[task] = where
    colours = {"accuracy": charts.BLUE, "majority baseline": charts.GREY}
    panels = []
    for task, where in sorted(names.items(), key=lambda item: (item[1], item[0])):
        if rows := points(rounds, f"{where}/{task}/acc", "accuracy"):
            levels = _base_level(rounds, f"{where}/{task}/acc", "accuracy")
            majority = number(rounds[0], f"{where}/{task}/majority")
            if majority is not None:
                levels.append({"series": "majority baseline", "value": 100 * majority, "what": "majority baseline"})
            title = f"{task} ({where.upper()})"
            panels.append(
                charts.curves(
                    title, rows, colours, y="accuracy (%)", levels=levels, width=220, height=130, legend=True
                )
            )  # fmt: skip
    caption = "band: 95% Wilson interval; dotted: the base, and in grey what the commonest answer scores"
    return Figure("tasks", panels, colours, columns=4, caption=caption) if panels else None


def gaps(rounds: Sequence[Line]) -> Figure | None:
    """Superficiality and memorisation over rounds, in points."""
    named = {
        "gap/superficiality": ("superficiality", "gain in domain minus gain out of domain", charts.PURPLE),
        "gap/memorisation": ("memorisation", "accuracy on training prompts minus on unseen ones", charts.GREEN),
    }
    panels = [
        charts.curves([title, said], rows, {title: colour}, y="points", levels=[{"value": 0, "what": "none"}])
        for name, (title, said, colour) in named.items()
        if (rows := points(rounds, name, title))
    ]
    return Figure("gaps", panels, caption="band: 95% interval, where there is one") if panels else None


# --- importance against change --------------------------------------------------------------------------------------


def changes(run: Run) -> dict[int, dict[str, float]]:
    """{round: {row: relative change}}, from the metrics or else from layers.json; rounds without are left out."""
    out = {}
    for i, line in enumerate(run.rounds):
        t = round_of(line, i)
        rows = rows_of(line, "weights/change") or relative(run.layers.get(t, {}))
        if t and rows:
            out[t] = rows
    return out


def relative(layers: Mapping[str, Any]) -> dict[str, float]:
    """{row: relative change} of a layers.json."""
    rows = merged(layers)
    return {r: v for r in in_order(list(rows)) if (v := number(rows[r], "relative")) is not None}


def merged(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a layers.json: of the merged model, where it tells several."""
    rows = layers.get("merged") or layers.get("pre_merge") or layers.get("change") or layers
    return {k: v for k, v in rows.items() if isinstance(v, dict) and "relative" in v} if isinstance(rows, dict) else {}


def importance(run: Run) -> Section:
    """One panel an estimator."""
    changed = changes(run)
    lines = {round_of(line, i): line for i, line in enumerate(run.rounds)}
    last = max(changed, default=0)
    shown = {f"change, round {t}": changed[t] for t in dict.fromkeys((last, min(changed, default=0))) if t in changed}
    blocks = importance_blocks(run.importance, shown, lines.get(last, {}))
    if run.importance and not changed:
        blocks.append(Note("no round has layer figures yet, so there is no change to compare with", warn=True))
    if run.importance_ood:
        of_ood = {n.replace("mismatch_ood/", "mismatch/"): v for n, v in lines.get(last, {}).items() if "_ood/" in n}
        heading = "Importance on out-of-domain text"
        blocks += importance_blocks(run.importance_ood, shown, of_ood, "importance_ood", heading)
    return Section("importance", "Importance against change", blocks)


def importance_blocks(
    content: Mapping[str, Any], changed: Mapping[str, Mapping[str, float]], line: Line,
    name: str = "importance_change", heading: str = "",
) -> list[Block]:  # fmt: skip
    """Bars of importance and lines of change by layer, with their mismatch from `line`; a note where there is none."""
    estimators = content.get("estimators")
    estimators = estimators if isinstance(estimators, dict) else {}
    order = dict.fromkeys([*ESTIMATORS, *estimators])
    estimators = {k: estimators[k] for k in order if isinstance(estimators.get(k), dict)}
    if not estimators:
        return [
            Note(
                "no layer importance: there is no importance.json (analysis.importance was off, or it failed)",
                warn=True,
            )
        ]
    colours = dict(zip(changed, (charts.VERMILLION, charts.PALE_VERMILLION), strict=False))
    blocks: list[Block] = []
    panels, legend, gone = [], {}, []
    for estimator, rows in estimators.items():
        panel = _importance_panel(estimator, rows, changed, line, colours)
        if panel is None:
            gone.append(estimator)
        else:
            panels.append(panel[0])
            legend |= panel[1]
    caption = (
        "Bars: a layer's share of the importance of all layers (whiskers: 95% over examples). Lines: its share of "
        "the relative change."
    )
    if panels:
        blocks.append(Charts(Figure(name, panels, legend | colours, columns=2, caption=caption), heading))
    if gone:
        blocks.append(Note(f"no finite figures of {', '.join(gone)}", warn=True))
    examples, source = number(content, "examples"), content.get("source")
    whose = _SOURCES.get(str(source), f"{source} solutions")
    if panels and not heading:
        blocks.append(Note(_HOW_TO_READ + (f" Importance was measured on {examples:.0f} {whose}." if examples else "")))
    return blocks


_SOURCES = {"verified": "verified solutions of the base", "file": "solutions from a file"}
_HOW_TO_READ = (
    "How to read it: where bars are high and the line is low, the update goes into layers that matter little, the "
    "paper's claim. There are two measures of change, which need not agree. The lines and the first ρ are of the "
    "change relative to a layer's own weights; the second ρ and what the top layers hold are of its part of the "
    "squared update, where layers with larger weights count more. Intervals resample the solutions, never the layers; "
    "p permutes the layers, and says whether so few of them can show anything."
)


def _importance_panel(
    estimator: str, rows: Mapping[str, Any], changed: Mapping[str, Mapping[str, float]], line: Line,
    colours: Mapping[str, str],
) -> tuple[charts.Panel, dict[str, str]] | None:  # fmt: skip
    numbered = [r for r in in_order(list(rows)) if re.fullmatch(r"layer_\d+", r)]
    figures = {r: v for r in numbered if isinstance(v := rows[r], dict)}
    means = {r: m for r, v in figures.items() if (m := number(v, "mean")) is not None}
    whole = sum(abs(m) for m in means.values())
    if not whole:
        return None
    k = int(number(line, "mismatch/top_k") or max(1, len(means) // 4))
    top = set(sorted(means, key=lambda r: -means[r])[:k])
    names = {True: f"importance: top {k}", False: "importance: other layers"}
    bars = [
        {
            "layer": int(r.removeprefix("layer_")), "what": names[r in top], "share": 100 * m / whole, "exact": m,
            **{end: None if (v := number(figures[r], end)) is None else 100 * v / whole for end in ("low", "high")},
        }
        for r, m in means.items()
    ]  # fmt: skip
    lines = []
    for what, values in reversed(list(changed.items())):
        layers = {r: v for r, v in values.items() if re.fullmatch(r"layer_\d+", r)}
        total = sum(layers.values())
        lines += [
            {"layer": int(r.removeprefix("layer_")), "what": what, "share": 100 * v / total, "exact": v}
            for r, v in layers.items() if total
        ]  # fmt: skip
    legend = {names[True]: charts.BLUE, names[False]: charts.PALE_BLUE}
    title = [estimator, *mismatch_text(line, estimator)]
    return charts.importance(title, bars, lines, legend | dict(colours), legend=True), legend


def mismatch_text(line: Line, estimator: str) -> list[str]:
    """What a round's metrics say of the mismatch, as short lines; none where they say nothing."""
    at = f"mismatch/{estimator}"
    said = []
    if (rho := number(line, f"{at}/spearman")) is not None:
        low, high = number(line, f"{at}/spearman_low"), number(line, f"{at}/spearman_high")
        interval = "" if low is None or high is None else f" [{signed(low)}, {signed(high)}]"
        p = number(line, f"{at}/p")
        tail = "" if p is None else f", {p_value(p)}"
        said.append(f"relative change: ρ = {signed(rho)}{interval}{tail}")
    parts = []
    if (squared := number(line, f"{at}/spearman_squared")) is not None:
        parts.append(f"ρ = {signed(squared)}")
    share, even = number(line, f"{at}/top_share"), number(line, f"{at}/top_expected")
    if share is not None:
        k = number(line, "mismatch/top_k")
        who = "top layers hold" if k is None else f"top {k:.0f} layers hold" if k != 1 else "the top layer holds"
        parts.append(f"{who} {100 * share:.0f}%" + ("" if even is None else f" ({100 * even:.0f}% if spread evenly)"))
    if parts:
        said.append(f"squared update: {'; '.join(parts)}")
    return said


# --- change ---------------------------------------------------------------------------------------------------------


def change(run: Run) -> Section:
    """Heatmaps of the change by layer and round, by layer and kind of matrix, and of successive updates."""
    blocks: list[Block] = []
    changed = changes(run)
    rounds = [t for i, line in enumerate(run.rounds) if (t := round_of(line, i))]
    fitted = {round_of(line, i) for i, line in enumerate(run.rounds) if "sft/loss" in line}
    for t in rounds:
        if t not in changed:
            reason = (
                "there is no layers.json" if t in fitted else "nothing was fitted in it: no correct sample, or skipped"
            )
            blocks.append(Note(f"round {t} has no layer figures: {reason}", warn=True))
    if not changed:
        return Section("layers", "Change by layer", blocks or [Note("no round after the base yet", warn=True)])
    panels = [by_round("relative change (%)", changed, rounds, 100)]
    last = max(changed)
    if last in run.layers and (panel := by_kind(run.layers[last], f"by kind of matrix, round {last} (%)")):
        panels.append(panel)
    else:
        blocks.append(
            Note(f"round {last} has no rounds/{last:02d}/layers.json: no figures by kind of matrix", warn=True)
        )
    for key, title, limits in (
        ("cosine", "cosine with the previous round's update", (-1.0, 1.0)),
        ("sign_agreement", "same sign as in the previous round's update", (0.0, 1.0)),
        ("effective_rank", "effective rank of the update, share of full", None),
    ):
        found = update_figures(run, key)
        if any(found.values()):
            panels.append(by_round(title, found, rounds, 1, limits, form="+.2f" if key == "cosine" else ".2f"))
    if len(panels) <= 2 and len(rounds) > 1:
        blocks.append(Note("no figures on how successive updates agree in this folder"))
    caption = (
        "relative change: ||θ_t − θ_0|| / ||θ_0|| of the merged model; a dash marks a round or row without figures"
    )
    if not is_vanilla(flat(run.config)):
        asked, left = (update_figures(run, key, "merge") for key in ("ratio", "share"))
        if len({v for rows in asked.values() for v in rows.values()}) > 1:
            panels.append(by_round("ratio of the last merge event", asked, rounds, 1, (0.0, 1.0), form=".2f"))
        if any(left.values()):
            panels.append(by_round("share of the update that it left", left, rounds, 1, (0.0, 1.0), form=".2f"))
            caption += "; share: ⟨merged − anchor, tuned − anchor⟩ / ||tuned − anchor||²"
    return Section("layers", "Change by layer", [Charts(Figure("layers", panels, caption=caption)), *blocks])


def update_figures(run: Run, key: str, of: str = "update") -> dict[int, dict[str, float]]:
    """{round: {row: figure}} of the rounds' own updates, or of their last merge events."""
    out = {}
    for i, line in enumerate(run.rounds):
        t = round_of(line, i)
        update = run.layers.get(t, {}).get(of)
        rows = update if isinstance(update, dict) else {}
        of_file = {r: n for r, v in rows.items() if isinstance(v, dict) and (n := number(v, key)) is not None}
        out[t] = rows_of(line, f"{'weights' if of == 'update' else of}/{key}") or of_file
    return out


def by_round(
    title: str, figures: Mapping[int, Mapping[str, float]], rounds: Sequence[int], scale: float,
    limits: tuple[float, float] | None = None, form: str = "",
) -> charts.Panel:  # fmt: skip
    """A heatmap of rows of the model over rounds."""
    rows = in_order([r for values in figures.values() for r in values])
    cells = [
        {"x": str(t), "y": r, "value": None if (v := figures.get(t, {}).get(r)) is None else scale * v}
        for t in rounds for r in rows
    ]  # fmt: skip
    diverging = limits is not None
    return charts.heatmap(
        title, cells, x="round", y="", form=form or digits(cells), limits=limits or extent(cells), label=" ",
        order_x=[str(t) for t in rounds], order_y=rows, diverging=diverging,
    )  # fmt: skip


def by_kind(layers: Mapping[str, Any], title: str) -> charts.Panel | None:
    """A heatmap of rows of the model over kinds of matrix; None where a layers.json does not tell kinds."""
    rows = merged(layers)
    order = ["q", "k", "v", "qkv", "o", "gate", "up", "down", "norms", "other", "embed", "norm", "head"]
    cells = [
        {"x": kind, "y": row, "value": 100 * v}
        for row, figures in rows.items() if row.startswith("layer_") and isinstance(figures.get("kinds"), dict)
        for kind, values in figures["kinds"].items() if (v := number(values, "relative")) is not None
    ]  # fmt: skip
    if not cells:
        return None
    kinds = [k for k in order if any(c["x"] == k for c in cells)]
    return charts.heatmap(
        title, cells, x="matrix", y="", form=digits(cells), limits=extent(cells), label=" ", order_x=kinds,
        order_y=in_order([c["y"] for c in cells]),
    )  # fmt: skip


def extent(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    values = [c["value"] for c in cells if c["value"] is not None]
    return min(values, default=0.0), max(values, default=1.0)


def digits(cells: Sequence[Mapping[str, Any]]) -> str:
    """As many decimals as tell the cells' values apart."""
    high = extent(cells)[1]
    return ".1f" if high >= 10 else ".2f" if high >= 0.3 else ".3f"


# --- diversity ------------------------------------------------------------------------------------------------------

# title: its metrics with their labels and colours, unit, scale, and form of the numbers
CURVES: tuple[tuple[str, dict[str, tuple[str, str]], str, float, str], ...] = (
    (
        "token entropy",
        {"diversity/token_entropy": ("on own samples", charts.BLUE),
         "diversity/fixed_text_entropy": ("on a fixed text", charts.SKY)},
        "nats a token", 1, ".3f",
    ),
    (
        "different solutions",
        {"diversity/distinct": ("of all", charts.BLUE),
         "diversity/distinct_correct": ("of the correct ones", charts.GREEN)},
        "share (%)", 100, ".1f",
    ),
    (
        "different n-grams",
        {"diversity/distinct_1": ("distinct-1", charts.SKY), "diversity/distinct_2": ("distinct-2", charts.BLUE),
         "diversity/distinct_3": ("distinct-3", charts.PURPLE), "diversity/distinct_4": ("distinct-4", charts.GREY)},
        "share (%)", 100, ".1f",
    ),
    ("self-BLEU (high: alike)", {"diversity/self_bleu": ("self-BLEU", charts.VERMILLION)}, "self-BLEU", 1, ".3f"),
    ("answer entropy", {"diversity/answer_entropy": ("answers to a problem", charts.BLUE)}, "nats", 1, ".3f"),
    ("KL to the base on out-of-domain text", {"kl/ood": ("KL", charts.FAR)}, "nats a token", 1, ".4f"),
    ("length of a solution", {"sample/tokens": ("tokens", charts.GREY)}, "tokens", 1, ".1f"),
)  # fmt: skip


def diversity(run: Run) -> Section:
    """Diversity over rounds, and pass@k and maj@k against k."""
    blocks: list[Block] = []
    panels, gone = [], []
    for title, metrics, y, scale, form in CURVES:
        rows = [row for name, (series, _) in metrics.items() for row in points(run.rounds, name, series, scale)]
        if not rows:
            gone.append(title)
            continue
        colours = {series: colour for series, colour in metrics.values() if any(r["series"] == series for r in rows)}
        levels = [
            level for name, (series, _) in metrics.items() if series in colours
            for level in _base_level(run.rounds, name, series, scale)
        ]  # fmt: skip
        panels.append(charts.curves(title, rows, colours, y=y, form=form, levels=levels, legend=len(colours) > 1))
        blocks += missing(rows, title)
    if panel := reasons(run.rounds):
        panels.append(panel)
    if panels:
        caption = "band: 95% interval over problems; dotted: the base"
        blocks.insert(0, Charts(Figure("diversity", panels, caption=caption), "Over rounds"))
    if gone:
        blocks.append(Note(f"not measured in this run: {', '.join(gone)}", warn=not panels))
    passes = pass_panels(run.rounds)
    if passes:
        caption = "band: 95% interval over problems, of the base and of the last round"
        figure = Figure("pass_at_k", *passes, columns=2, caption=caption)
        blocks.append(Charts(figure, "With more samples"))
        blocks.append(Note("Collapse shows as pass@1 up, with pass@k for large k and entropy down."))
    else:
        blocks.append(Note("no pass@k: suite.pass_k_n is 0, or no round is written", warn=True))
    return Section("diversity", "Diversity", blocks)


def reasons(rounds: Sequence[Line]) -> charts.Panel | None:
    """What became of samples, as stacked shares: of held-out problems, else of the round's training samples."""
    for prefix, whose in (("sample", "held-out samples"), ("train_sample", "training samples")):
        rows = []
        for i, line in enumerate(rounds):
            counts = {r: v for r in charts.REASONS if (v := number(line, f"{prefix}/{r}")) is not None}
            whole = sum(counts.values())
            rows += [
                {"x": round_of(line, i), "series": r, "value": 100 * v / whole} for r, v in counts.items() if whole
            ]
        if rows:
            return charts.stacked(f"verdicts on {whose}", rows, charts.REASONS)
    return None


def pass_panels(rounds: Sequence[Line]) -> tuple[list[charts.Panel], dict[str, str]] | None:
    """pass@k and maj@k against k, a line a round."""
    labels = ["base" if not (t := round_of(line, i)) else f"round {t}" for i, line in enumerate(rounds)]
    colours = dict(zip(labels, [charts.GREY, *charts.ramp(max(1, len(labels) - 1))], strict=False))
    panels = []
    for what, title in (
        ("pass", "pass@k: at least one of k is correct"),
        ("maj", "maj@k: the majority of k is correct"),
    ):
        rows = []
        for label, line in zip(labels, rounds, strict=True):
            ks = sorted(int(k) for n in line if (k := n.removeprefix(f"sample/{what}@")).isdigit())
            for k in ks:
                value, low, high = (
                    None if (v := number(line, f"sample/{what}@{k}{e}")) is None else 100 * v
                    for e in ("", "_low", "_high")
                )
                if value is not None:
                    rows.append({"x": k, "series": label, "value": value, "low": low, "high": high})
        if rows:
            panels.append(charts.steps(title, rows, colours, x="k", y="problems (%)", legend=True))
    return (panels, colours) if panels else None


# --- samples --------------------------------------------------------------------------------------------------------


def samples(run: Run) -> Section:
    """The sample browser, and which rounds have none."""
    blocks: list[Block] = []
    read: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for folder in sorted(d for d in (run.folder / "rounds").glob("*") if d.name.isdigit()):
        for file, whose in (("samples.jsonl", "training"), ("held_out.jsonl", "held-out")):
            rows, broken = read_lines(folder / file)
            if rows:
                read[int(folder.name), whose] = rows
            if broken:
                blocks.append(Note(f"rounds/{folder.name}/{file}: {broken} unreadable lines are left out", warn=True))
    without = [str(t) for i, line in enumerate(run.rounds) if (t := round_of(line, i)) and (t, "training") not in read]
    if without:
        blocks.append(Note(f"no training samples of round {', '.join(without)} in this folder", warn=True))
    if not any(whose == "held-out" for _, whose in read):
        blocks.append(Note("no held-out samples in this folder"))
    if not read:
        return Section("samples", "Samples", blocks)
    most = ROWS_SHOWN
    while len(embed(data := sample_data(read, most)).encode()) > BUDGET and most > 1:
        most = most * 4 // 5
    return Section("samples", "Samples", [Samples(data), *blocks])


def sample_data(read: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]], most: int) -> dict[str, Any]:
    """What the browser shows: up to `most` samples a round and set, prompts once each."""
    prompts: dict[str, int] = {}
    rows, shown = [], []
    for (t, whose), every in read.items():
        chosen = spread(every, most)
        shown.append({"round": t, "set": whose, "shown": len(chosen), "of": len(every)})
        for row in chosen:
            prompt, text = str(row.get("prompt", "")), str(row.get("completion", ""))
            if len(prompt) > 2 * LONGEST:
                prompt = prompt[: 2 * LONGEST] + f" … (cut, {len(prompt)} characters)"
            rows.append(
                {
                    "round": t, "set": whose, "prompt": prompts.setdefault(prompt, len(prompts)),
                    "text": text[:LONGEST], "length": len(text), "answer": _said(row.get("answer")),
                    "gold": _said(row.get("gold")), "ok": bool(row.get("verdict")), "reason": _said(row.get("reason")),
                    "sample": _said(row.get("sample")), "tokens": number(row, "tokens"),
                    "entropy": None if (e := number(row, "entropy")) is None else round(e, 2),
                }
            )  # fmt: skip
    return {"prompts": list(prompts), "rows": rows, "shown": shown, "longest": LONGEST}


def _said(value: Any) -> str:
    return "" if value is None else str(value)[:LONGEST]


def spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most `most` rows in order, evenly over problems, and over the samples of a problem."""
    if len(rows) <= most:
        return list(rows)
    by_problem: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_problem.setdefault(str(row.get("id")), []).append(i)
    problems = list(by_problem.values())
    if len(problems) > most:
        problems = [problems[i * len(problems) // most] for i in range(most)]
    taken: list[int] = []
    for turn in range(max(map(len, problems))):
        for i, mine in enumerate(problems):
            if turn < len(mine) and len(taken) < most:
                taken.append(mine[(i + turn) % len(mine)])
    return [rows[i] for i in sorted(taken)]


# --- the rest -------------------------------------------------------------------------------------------------------


def about(run: Run) -> Section:
    """Time by stage, config and provenance."""
    blocks: list[Block] = []
    seconds = stage_seconds(run.timing.get("stages"))
    if seconds:
        colours = {"computed": charts.BLUE, "read from the store": charts.PALE_BLUE}
        rows = [{"name": name, "series": how, "value": value} for (name, how), value in seconds.items()]
        figure = Figure("timing", [charts.bars(rows, colours, x="seconds")], colours)
        whole = number(run.timing, "seconds")
        blocks.append(Charts(figure, "Time by stage" + ("" if whole is None else f": {whole:.1f} s in all")))
    else:
        blocks.append(Note("no timing.json: it is written when a run ends", warn=True))
    config = run.folder / "config.yaml"
    if config.is_file():
        blocks.append(Pre("config.yaml", config.read_text(errors="replace")))
    if run.provenance:
        diff = str(run.provenance.get("diff") or "")
        rest = {k: v for k, v in run.provenance.items() if k != "diff"}
        blocks.append(Pre("provenance.json", json.dumps(rest, indent=1, ensure_ascii=False)))
        if diff:
            cut = f"\n… (cut, {len(diff)} characters)" if len(diff) > 20_000 else ""
            blocks.append(Pre("difference to the commit", diff[:20_000] + cut))
    else:
        blocks.append(Note("no provenance.json", warn=True))
    return Section("about", "Config, provenance, time", blocks)


def stage_seconds(stages: Any) -> dict[tuple[str, str], float]:
    """{(stage, how): seconds}, from a list of {stage, seconds, reused} or from {stage: seconds}."""
    out: dict[tuple[str, str], float] = {}
    if isinstance(stages, dict):
        stages = [{"stage": k, "seconds": v} for k, v in stages.items()]
    for row in stages if isinstance(stages, list) else []:
        if isinstance(row, dict) and (seconds := number(row, "seconds")) is not None:
            key = str(row.get("stage")), "read from the store" if row.get("reused") else "computed"
            out[key] = out.get(key, 0.0) + seconds
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def analysis_page(folder: Path) -> Page:
    """The page of a comparison of two checkpoints."""
    run = Run(folder)
    facts, layers, content = (run.json(name) for name in ("analysis.json", "layers.json", "importance.json"))
    changed = {"change": found} if (found := relative(layers)) else {}
    blocks = importance_blocks(content, changed, facts)
    heat: list[Block] = []
    if changed:
        t = {"tuned": changed["change"]}
        rows = [{"x": "tuned", "y": r, "value": 100 * v} for r, v in t["tuned"].items()]
        panels = [
            charts.heatmap("relative change (%)", rows, x="", y="", form=digits(rows), limits=extent(rows), label=" ",
                           order_x=["tuned"], order_y=list(t["tuned"]))
        ]  # fmt: skip
        if panel := by_kind(layers, "by kind of matrix (%)"):
            panels.append(panel)
        heat.append(Charts(Figure("layers", panels, caption="relative change: ||θ − θ_0|| / ||θ_0||")))
    else:
        heat.append(Note("no layer figures: layers.json is absent or holds none", warn=True))
    notes = [Note(b, warn=True) for b in run.broken]
    said = facts.get("notes")
    notes += [Note(str(n), warn=True) for n in said] if isinstance(said, list) else []
    words = {k: str(v) for k, v in facts.items() if isinstance(v, str)}
    title = f"{words.get('tuned', 'tuned')} against {words.get('base', 'base')}"
    subtitle = "layer change and importance" + (
        f"; importance on {_SOURCES.get(words['source'], words['source'] + ' solutions')}" if "source" in words else ""
    )
    sections = [
        Section("importance", "Importance against change", blocks), Section("layers", "Change by layer", heat),
        Section("about", "Figures", [Pre("analysis.json", json.dumps(facts, indent=1, ensure_ascii=False))]),
    ]  # fmt: skip
    return Page(title, subtitle, "ok", "a comparison of two checkpoints", [], notes, sections)
