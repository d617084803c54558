"""Configs: every shipped member composes and passes its checks, bad values are named, and the dependency law holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import compose_config
from hydra.errors import HydraException
from omegaconf import OmegaConf

import itermerge
from itermerge.config import KINDS, ConfigError, MergeNone, check, conf_dir, to_dict

GROUPS = sorted(d.name for d in conf_dir().iterdir() if d.is_dir() and d.name not in ("experiment", "hydra"))
MEMBERS = [(g, f.stem) for g in (*GROUPS, "merge/policy") for f in sorted((conf_dir() / g).glob("*.yaml"))]
EXPERIMENTS = sorted(
    str(f.relative_to(conf_dir() / "experiment").with_suffix("")) for f in (conf_dir() / "experiment").rglob("*.yaml")
)
NEEDS = {  # members that are not whole without a value of the user's, or go with another one
    ("model", "hf"): ["model.path=/somewhere"],
    ("teacher", "hf"): ["teacher.path=/somewhere"],
    ("teacher", "file"): ["teacher.path=/somewhere.jsonl"],
    ("task", "hub"): ["task.path=a/b", "task.question=q", "task.answer=a", "task.verifier=numeric"],
    ("task", "math500"): ["task.splits={train: test, validation: test}"],  # for suites: it has a test split alone
    ("merge/policy", "angle"): ["merge.every_n_epochs=last"],
    ("merge/policy", "search"): ["merge.every_n_epochs=last"],
    ("trainer", "fsdp"): ["merge.every_n_epochs=last"],
}


def test_default_config() -> None:
    root = check(compose_config())
    assert (root.rounds, root.merge.ratio, root.merge.anchor, root.task.family) == (3, 0.5, "base", "chain")
    assert [t.family for t in root.suite.near] == ["pair", "find", "mod", "mad"]
    again = check(OmegaConf.create(to_dict(root)))
    assert to_dict(again) == to_dict(root)


def test_all_groups_are_found() -> None:
    assert set(GROUPS) == set(KINDS) | {"suite", "launch", "baseline", "trainer"}
    assert len(MEMBERS) > 10
    assert "quickstart" in EXPERIMENTS


@pytest.mark.parametrize(("group", "member"), MEMBERS)
def test_every_member_passes(group: str, member: str) -> None:
    root = check(compose_config(f"{group}={member}", *NEEDS.get((group, member), [])))
    if group == "merge/policy":
        assert root.merge.policy.kind == member
    elif group == "trainer":
        assert root.trainer.strategy == member
    elif group not in ("suite", "launch", "baseline"):
        kinds = KINDS[group]
        assert type(getattr(root, group)) is kinds.get(getattr(root, group).kind, kinds.get("*"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_passes_and_says_where_it_is_from(name: str) -> None:
    check(compose_config(f"experiment={name}"))
    head = (conf_dir() / "experiment" / f"{name}.yaml").read_text()
    assert head.startswith("# @package _global_")
    assert "# Source:" in head
    assert re.search(rf"^# Command: .*experiment={name}\b", head, re.M)


@pytest.mark.parametrize("gpus", ["one", "[]", "[a]", "[-1]", "[true]", "2"])
def test_gpus_are_null_all_or_a_list_of_numbers(gpus: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.gpus: must be null, all, or a list of GPU numbers as \[0,1\]"):
        check(compose_config(f"sweep.gpus={gpus}"))
    assert [check(compose_config(f"sweep.gpus={ok}")).sweep.gpus for ok in ("null", "all", "[0,3]")] == [
        None, "all", [0, 3]
    ]  # fmt: skip


def test_metrics_of_ood_validation_need_items() -> None:
    with pytest.raises(ConfigError, match=r"optimized_metric: val/ood/acc needs .* set suite\.n_validation"):
        check(compose_config("optimized_metric=val/ood/acc"))
    check(compose_config("optimized_metric=val/ood/near/acc", "suite.n_validation=20"))
    for metric in ("val/ood/near/acc", "ood/near/acc"):
        with pytest.raises(ConfigError, match=f"optimized_metric: '{metric}' is none of"):
            check(compose_config(f"optimized_metric={metric}", "suite.n_validation=20", "suite.near=[]"))


def test_a_member_that_needs_a_value_says_so() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: a value is needed"):
        check(compose_config("model=hf"))


BAD = [
    # misspelt, also with +, also deep
    (["+merge.ratoi=0.2"], r"^merge\.ratoi: there is no such key; did you mean merge\.ratio\?"),
    (["+roudns=2"], r"^roudns: there is no such key; did you mean rounds\?"),
    (["+sft.lr_peak=1"], r"^sft\.lr_peak: there is no such key"),
    (["+trainer.acelerator=cpu"], r"^trainer\.acelerator: .*did you mean trainer\.accelerator\?"),
    (["+task.familly=pair"], r"^task\.familly: .*did you mean task\.family\?"),
    (["suite.far=[{kind: lab, famly: sort}]"], r"^suite\.far\[0\]\.famly: .*did you mean family\?"),
    (["+new.group=1"], r"^new: there is no such key"),
    # wrong type
    (["rounds=many"], r"^rounds: .*'many'"),
    (["rounds=1.5"], r"^rounds: "),
    (["merge.ratio=half"], r"^merge\.ratio: .*'half'"),
    (["sft.epochs=[1]"], r"^sft\.epochs: "),
    (["suite.pre_merge=maybe"], r"^suite\.pre_merge: "),
    (["suite.near=pair"], r"^suite\.near: expected a list of tasks, got 'pair'"),
    (["suite.near=[pair]"], r"^suite\.near\[0\]: expected a group of keys with a kind, got 'pair'"),
    # out of range
    (["merge.ratio=1.5"], r"^merge\.ratio: must be at most 1, got 1\.5"),
    (["merge.ratio=-0.1"], r"^merge\.ratio: must be at least 0, got -0\.1"),
    (["merge.ratio=nan"], r"^merge\.ratio: must be at least 0, got nan"),
    (["rounds=0"], r"^rounds: must be at least 1, got 0"),
    (["threads=0"], r"^threads: must be at least 1"),
    (["seed=-1"], r"^seed: must be at least 0"),
    (["sft.lr=0"], r"^sft\.lr: must be above 0"),
    (["sft.warmup_ratio=2"], r"^sft\.warmup_ratio: must be at most 1"),
    (["suite.pass_k_n=201"], r"^suite\.pass_k_n: 201 problems, task\.n_validation has only 200"),
    (["sft.beta1=1"], r"^sft\.beta1: must be below 1, got 1"),
    (["sft.beta2=1.0"], r"^sft\.beta2: must be below 1, got 1"),
    (["sampler.temperature=0"], r"^sampler\.temperature: must be above 0"),
    (["sampler.top_p=1.01"], r"^sampler\.top_p: must be at most 1"),
    (["sampler.n=0"], r"^sampler\.n: must be at least 1"),
    (["task.max_solutions=0"], r"^task\.max_solutions: must be at least 1"),
    (["task.problems=same"], r"^task\.problems: 'same' is none of fixed, fresh"),
    (["sft.start=last"], r"^sft\.start: 'last' is none of merged, base, tuned"),
    (["sft.data=keep"], r"^sft\.data: 'keep' is none of replace, accumulate"),
    (["merge.anchor=bsae"], r"^merge\.anchor: 'bsae' is none of base, previous, mean"),
    (["loop.on_empty=go"], r"^loop\.on_empty: 'go' is none of stop, skip"),
    (["trainer.precision=64"], r"^trainer\.precision: "),
    (["trainer.precision=16-mixed", "trainer.accelerator=cpu"], r"^trainer\.precision: 16-mixed needs a GPU"),
    # several devices
    (["trainer.devices=2"], r"^trainer\.devices: 2 devices need a strategy; use trainer=ddp or trainer=fsdp"),
    (["trainer.devices=auto"], r"^trainer\.devices: auto devices need a strategy"),
    *(([f"trainer={kind}", f"trainer.devices={n}"], r"^trainer\.devices: must be a whole number from 1, or auto; got ")
      for kind in ("ddp", "fsdp") for n in ("0", "true", "many", "1.5", "[0,1]")),
    (["trainer.strategy=dp"], r"^trainer\.strategy: 'dp' is none of single, ddp, fsdp"),
    (["trainer=ddp", "trainer.devices=64"], r"^sft\.batch_size: 32 examples a step .* trainer\.devices=64"),
    (["trainer=ddp", "sweep.gpus=all"], r"^trainer\.devices: sweep\.gpus gives jobs GPUs of their own; say how many"),
    (["trainer=ddp", "trainer.devices=2", "sweep.gpus=[3]"], r"^trainer\.devices: 2 for each job, .*gpus has 1"),
    (["trainer=ddp", "experiment=pretrain_lab"], r"^trainer\.strategy: the lab's models are pretrained in one process"),
    (["trainer=fsdp"], r"^merge\.every_n_epochs: .*use merge\.every_n_epochs=last, or trainer=ddp"),
    *((["trainer=fsdp", "merge.every_n_epochs=last", word], rf"^{word.split('=')[0]}: trainer\.strategy=fsdp .*whole")
      for word in ("model.lora.rank=4", "sft.l2_to_base=0.1", "sft.kl_to_base=0.1", "sft.patience=1")),
    (["trainer=fsdp", "merge=none", "trainer.precision=16-mixed"], r"^trainer\.precision: 16-mixed does not go with"),
    (["logger=wandb", "logger.mode=on"], r"^logger\.mode: .* is none of offline, online, disabled"),
    # unknown kinds and names
    (["merge.combine=men"], r"^merge\.combine: 'men' is none of mean, sum, elect, slerp, stock, tall, consensus"),
    (["merge.density=0.5"], r"^merge\.density: merge=linear \(sparsify=none, combine=mean\) has no such parameter"),
    (["merge=ties", "merge.rescale=true"], r"^merge\.rescale: merge=ties .* has no such parameter; leave it null"),
    (["merge.sparsify=random"], r"^merge\.density: a value is needed by merge=linear \(sparsify=random"),
    (["merge=dare", "merge.density=0"], r"^merge\.density: must be above 0, got 0"),
    (["merge=dare", "merge.density=1.2"], r"^merge\.density: must be at most 1, got 1\.2"),
    (["merge=dare", "merge.mask=new"], r"^merge\.mask: 'new' is none of fresh, fixed"),
    (["merge=ties", "merge.scope=layer"], r"^merge\.scope: 'layer' is none of tensor, model"),
    (["merge=della", "merge.epsilon=0.6"], r"^merge\.epsilon: density - epsilon must be above 0 .* epsilon 0\.6"),
    (["merge=breadcrumbs", "merge.gamma=0.2"], r"^merge\.gamma: density \+ gamma must be at most 1, got 0\.9 \+ 0\.2"),
    (["merge=task_arithmetic", "merge.weights=[1.0]"], r"^merge\.weights: a round has one tuned model"),
    (["merge=model_stock", "merge.over=tuned"], r"^merge\.combine=stock: .*use merge\.over=rounds"),
    (["merge=consensus", "merge.over=tuned"], r"^merge\.combine=consensus: .*use merge\.over=rounds"),
    (["merge=ties_rounds", "merge.every_n_epochs=1"], r"^merge\.over=rounds: .*use merge\.every_n_epochs=last"),
    (["merge=model_stock", "merge.sparsify=random", "merge.density=0.5", "merge.rescale=true", "merge.mask=fresh",
      "merge.seed=0"], r"^merge\.combine=stock: takes its angle from whole updates"),
    (["merge/policy=importance", "merge.ratio=0.8"], r"^merge\.policy: .* may be 0\.8 x 1\.5"),
    (["merge.kind=[a]"], r"^merge\.kind: \['a'\] is no name$"),
    (["experiment=pretrain_lab", "model.lora.rank=4"], r"^model\.lora\.rank: a model is pretrained with all"),
    (["merge=slerp", "merge.over=rounds"], r"^merge\.combine=slerp: goes with sparsify=none and over=tuned"),
    (["+merge.params.k=1"], r"^merge\.params: are those of merge\.function"),
    (["merge.policy.layers=[]"], r"^merge\.policy\.layers: expected a list of factors from 0, .* got \[\]"),
    (["merge.policy.rounds=[3.0]"], r"^merge\.policy: merge\.ratio times its factors must stay at most 1"),
    (["merge.policy.modules=[{match: q}]"], r"^merge\.policy\.modules\[0\]: expected \{match: PATTERN, factor: "),
    (["merge.policy.modules=[{match: '(', factor: 1}]"], r"^merge\.policy\.modules\[0\]\.match: '\(' is no pattern"),
    (["merge.policy.modules=[{match: q, factor: -1}]"], r"^merge\.policy\.modules\[0\]\.factor: must be a number"),
    (["merge/policy=importance", "analysis.importance=[taylor]"], r"^merge\.policy\.importance: 'skip' is not"),
    (["merge.policy.span=2"], r"^merge\.policy\.span: spreads merge\.policy\.rounds, which has one factor"),
    (["merge.policy.tolerance=0.1"], r"^merge\.policy\.tolerance, merge\.policy\.metric: are of the line search"),
    (["merge.policy.strength=0.5"], r"^merge\.policy\.strength: needs merge\.policy\.importance"),
    (["merge/policy=angle"], r"^merge\.policy\.angle: decides after the fit; use merge\.every_n_epochs=last"),
    (["merge/policy=search", "merge.every_n_epochs=last", "merge.policy.metric=val/mean/acc"],
     r"^merge\.policy\.metric: val/mean/acc needs OOD validation items, suite\.n_validation=50"),
    (["model.lora.targets=q_proj"], r"^model\.lora\.targets: must be all-linear or a list of .* got 'q_proj'"),
    (["suite.near=[{kind: labb, family: pair}]"], r"^suite\.near\[0\]\.kind: 'labb' is none of lab, gym"),
    (["task.family=chian"], r"^task\.family: .*'chian'"),
    (["suite.far=[{kind: lab, family: srot}]"], r"^suite\.far\[0\]\.family: .*'srot'"),
    (["optimized_metric=id/ac"], r"^optimized_metric: 'id/ac' is none of .*val/id/acc"),
    (["optimized_metric=ood/chain/acc"], r"^optimized_metric: "),  # chain is in-domain
    # every_n_epochs
    (["merge.every_n_epochs=0"], r"^merge\.every_n_epochs: must be a whole number from 1, or last; got 0"),
    (["merge.every_n_epochs=often"], r"^merge\.every_n_epochs: .*got 'often'"),
    (["merge.every_n_epochs=1.5"], r"^merge\.every_n_epochs: .*got 1\.5"),
    (["merge.every_n_epochs=true"], r"^merge\.every_n_epochs: .*got True"),
    # tasks
    (["task.family=pair"], r"^task, suite\.near, suite\.far: pair stands there more than once"),
    (["suite.far=[{kind: lab, family: mod}]"], r"^task, suite\.near, suite\.far: mod stands there more than once"),
    (["suite.near=[]", "suite.far=[]"], r"^suite\.near, suite\.far: at least one OOD task is needed"),
    # a key of another member of the group
    (["merge=none", "+merge.ratio=0.5"], r"^merge\.ratio: merge=none has no keys"),
    (["store=none", "+store.dir=x"], r"^store\.dir: there is no such key"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(compose_config(*overrides))


@pytest.mark.parametrize("override", ["merge.ratoi=0.2", "roudns=2", "sft.epoch=1"])
def test_hydra_refuses_a_misspelt_key_without_plus(override: str) -> None:
    with pytest.raises(HydraException, match=re.escape(override.split("=")[0])):
        compose_config(override)


def test_ratio_is_no_key_of_merge_none() -> None:
    assert isinstance(check(compose_config("merge=none")).merge, MergeNone)
    with pytest.raises(HydraException, match=r"merge\.ratio"):
        compose_config("merge=none", "merge.ratio=0.5")


@pytest.mark.parametrize("override", ["merge.every_n_epochs=last", "merge.every_n_epochs=3", "merge.ratio=1",
                                      "task.max_solutions=null", "suite.near=[]", "optimized_metric=ood/mod/acc",
                                      "optimized_metric=id/chain/acc", "trainer=ddp"])  # fmt: skip
def test_good_values(override: str) -> None:
    check(compose_config(override))


def test_a_broken_interpolation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        check(compose_config("store.dir=${nowhere}"))


# --- the dependency law: cli -> loop -> stages -> leaves -----------------------------------------------------------

SOURCE = Path(itermerge.__file__).parent


def _imports(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; our own ones as `.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            ours = bool(node.level) or (node.module or "").split(".")[0] == "itermerge"
            module = (node.module or "").removeprefix("itermerge").strip(".")
            if not ours:
                found.add(module.split(".")[0])
            elif module:
                found.add("." + module.split(".")[0])
            else:
                found |= {"." + alias.name for alias in node.names}
    return found


MODULES = {str(f.relative_to(SOURCE)): _imports(f) for f in SOURCE.rglob("*.py")}
LEAVES = {m for m in MODULES if m.split("/")[0].removesuffix(".py") in (
    "weights", "policy", "sft", "merging", "evaluation", "harness", "analysis", "store", "tasks"
)}  # fmt: skip


def test_the_law_reads_the_sources() -> None:
    assert len(LEAVES) >= 8
    assert "hydra" in MODULES["cli.py"]
    assert ".stages" in MODULES["loop.py"]
    assert ".policy" in MODULES["stages.py"]


def test_only_the_doors_know_hydra() -> None:
    assert {m for m, names in MODULES.items() if names & {"hydra", "hydra_plugins"}} == {"cli.py"}


def test_only_tracking_knows_wandb() -> None:
    assert {m for m, names in MODULES.items() if "wandb" in names} == {"tracking.py"}


def test_leaves_look_up_to_nothing() -> None:
    above = {"hydra", "omegaconf", "wandb", ".loop", ".stages", ".cli", ".tracking", ".report", ".config"}
    assert {m: names & above for m, names in MODULES.items() if m in LEAVES and names & above} == {}
    assert {m for m, names in MODULES.items() if ".cli" in names} == {"__main__.py"}
    assert {m for m, names in MODULES.items() if ".loop" in names} <= {"cli.py", "plan.py"}
    assert not MODULES["stages.py"] & {".loop", ".cli", ".report"}


@pytest.mark.parametrize("module", ["report", "config", "cli"])
def test_what_draws_and_checks_loads_no_torch(module: str) -> None:
    code = f"import sys, itermerge.{module}; print(sorted({{'torch', 'transformers', 'wandb'}} & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
