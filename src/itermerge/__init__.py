"""Iterative Model Merging for self-improving reasoning language models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .policy import Policy

__all__ = ["Run", "load_run"]


@dataclass(frozen=True)
class Run:
    """A run folder, read: nested `config`, `rounds` (round 0 is the base), `summary` (None while unfinished)."""

    folder: Path
    config: dict[str, Any]
    rounds: list[dict[str, float]]
    summary: dict[str, Any] | None

    def model(self, number: int | None = None) -> Policy:
        """The merged model of a round (default: the last one), with its tokenizer: `.model` and `.tokenizer` are
        Hugging Face objects. Raises FileNotFoundError for a round that has none."""
        from .policy import Policy

        number = self.rounds[-1]["round"] if number is None else number  # pyright: ignore[reportAssignmentType]
        folder = self.folder / "rounds" / f"{int(number or 0):02d}" / "model"
        if not folder.is_dir():
            have = [str(int(d.parent.name)) for d in sorted(self.folder.glob("rounds/*/model"))]
            raise FileNotFoundError(
                f"round {number} of {self.folder} has no model (rounds that have one: {', '.join(have) or 'none'}; "
                "store.keep says whose weights stay)"
            )
        return Policy(folder)


def load_run(folder: str | Path) -> Run:
    """The run in `folder`: config, rounds, summary, models. Raises FileNotFoundError when it is no run folder."""
    import json

    from omegaconf import OmegaConf

    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "rounds.jsonl").is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it needs config.yaml and rounds.jsonl")
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = folder / "summary.json"
    return Run(folder, config, rounds, json.loads(summary.read_text()) if summary.is_file() else None)  # pyright: ignore[reportArgumentType]
