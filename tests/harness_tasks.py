"""Two tasks of lm-evaluation-harness in local files: choices of sums, and sums to be written."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl, train: FOLDER/choice.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """\
task: local_sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
generation_kwargs: {until: ["\\n"], max_gen_toks: 40, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu}
filter_list:
  - name: after-hash
    filter: [{function: regex, regex_pattern: "#(-?[0-9]+)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
"""
GROUP = "group: local_all\ntask: [local_choice, local_sums]\n"


def write(folder: Path, sums: list[tuple[str, str]]) -> list[dict[str, object]]:
    """The task files and their data under `folder`, `sums` as (question, answer); the choices' rows."""
    rows: list[dict[str, object]] = [
        {"question": q, "choices": [a, str(int(a) + 10), str(int(a) + 2)][at % 3 :] + [a, str(int(a) + 10)][: at % 3],
         "answer": -at % 3}
        for at, (q, a) in enumerate(sums)
    ]  # fmt: skip
    for row, (_, answer) in zip(rows, sums, strict=True):
        choices = row["choices"]
        row["choices"] = [f"#{c}" for c in choices]
        row["answer"] = row["choices"].index(f"#{answer}")
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in sums))
    for name, text in {"choice": CHOICES, "sums": WRITTEN, "all": GROUP}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return rows
