"""Task files of lm-eval from strangers: code runs with consent only, and consent is never in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig, HarnessTask
from longrope.evaluation.harness import Harness
from longrope.evaluation.run import evaluate
from longrope.models.config import LoadOptions
from tests.conftest import Ran
from tests.evaluation.embedded import WINDOW, none, tiny, tiny_tokenizer
from tests.evaluation.tiny import refused
from tests.recipes.recipes import SEARCH_4, write_recipe

PLAIN = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
"""
METRICS = "metric_list: [{metric: bits_per_byte}]\n"
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef f(*a, **k): return a[0]\n"
OPEN = "{{ cycler.__init__.__globals__.os.system('touch FOLDER/ran') }}"
RUNS_CODE = {
    "function": (PLAIN + METRICS + "process_docs: !function evil.f\n", "!function"),
    "function-of-an-installed-module": (PLAIN + METRICS + "process_docs: !function os.system\n", "!function"),
    "nested": (PLAIN + "metric_list: [{metric: bits_per_byte, aggregation: !function evil.f}]\n", "!function"),
    "in-fewshot": (PLAIN + METRICS + "fewshot_config: {samples: !function evil.f}\n", "!function"),
    "included": (METRICS + "include: other.yaml\ntask: own\n", "other.yaml"),
    "included-in-a-list": (METRICS + "include: [plain.yaml, other.yaml]\ntask: own\n", "other.yaml"),
    "included-twice-over": (METRICS + "include: between.yaml\ntask: own\n", "other.yaml"),
    "included-from-elsewhere": (METRICS + "include: FOLDER/other.yaml\ntask: own\n", "other.yaml"),
    "group": ("group: g\ntask:\n- task: own\n  doc_to_text: !function evil.f\n", "!function"),
    "group-of-groups": ("group: g\ntask: [{group: h, task: [{task: own, process_docs: !function evil.f}]}]", "!func"),
    "class": ("task: own\nclass: !function evil.f\n", "!function"),
    "python-tag": ("task: !!python/object/apply:os.system [touch FOLDER/ran]\n", "python/object"),
    "script-metric": (PLAIN + "metric_list: [{metric: FOLDER/evil.py}]\n", "is not lm-eval's own"),
    "folder-metric": (PLAIN + "metric_list: [{metric: FOLDER/evil}]\n", "is not lm-eval's own"),
    "hub-metric": (PLAIN + "metric_list: [{metric: acc, hf_evaluate: true}]\n", "is not lm-eval's own"),
    "script-data": ("task: own\ndataset_path: FOLDER/evil.py\n", "evil.py"),
    "pickled-data": ("task: own\ndataset_path: pandas\ndataset_kwargs: {data_files: a.pkl}\n", "'pandas'"),
    "own-consent": (PLAIN + METRICS + "dataset_kwargs2: {trust_remote_code: true}\n", "by itself"),
    "unsafe-code": (PLAIN + METRICS + "unsafe_code: true\n", "unsafe_code"),
    "prompt-library": (PLAIN + METRICS + "use_prompt: promptsource:x\n", "use_prompt"),
}


def lay(folder: Path, text: str) -> str:
    """The task file `own.yaml` with everything that the others name beside it."""
    folder.mkdir(exist_ok=True)
    files = {
        "own.yaml": text,
        "plain.yaml": PLAIN,
        "other.yaml": PLAIN + "process_docs: !function evil.f\n",
        "between.yaml": "include: other.yaml\n",
        "evil.py": CODE,
        "rows.jsonl": json.dumps({"text": "some words of a text"}) + "\n",
    }
    (folder / "evil").mkdir(exist_ok=True)
    (folder / "evil/evil.py").write_text(CODE)
    for name, content in files.items():
        (folder / name).write_text(content.replace("FOLDER", str(folder)))
    return str(folder / "own.yaml")


def ran(folder: Path) -> bool:
    return any(folder.rglob("ran"))


@pytest.mark.parametrize("case", RUNS_CODE)
def test_code_of_a_task_file_needs_consent(case: str, tmp_path: Path) -> None:
    text, why = RUNS_CODE[case]
    path = lay(tmp_path, text)
    with refused("untrusted-code", "the task file", "trust_remote_code=True", why):
        Harness([HarnessTask(path)])
    assert not ran(tmp_path)


def test_a_template_runs_in_a_sandbox_without_consent(tmp_path: Path) -> None:
    path = lay(tmp_path, (PLAIN + METRICS).replace("{{text}}", OPEN))
    with refused("runtime-fault", "lm-eval cannot run", "SecurityError"):
        Harness([HarnessTask(path)]).measure(tiny(), tiny_tokenizer(), HarnessTask(path), none(), length=WINDOW)
    assert not ran(tmp_path)


def test_with_consent_the_code_runs_and_plain_files_need_none(tmp_path: Path) -> None:
    plain = lay(tmp_path, "include: plain.yaml\n" + METRICS + "task: own\ndoc_to_target: '{{text.strip()}}'\n")
    (row,) = Harness([HarnessTask(plain)]).measure(
        tiny(), tiny_tokenizer(), HarnessTask(plain), none(), length=WINDOW, limit=1
    )
    path = lay(tmp_path / "b", RUNS_CODE["included-twice-over"][0])
    trusting = Harness([HarnessTask(path)], trust_remote_code=True)
    (same,) = trusting.measure(tiny(), tiny_tokenizer(), HarnessTask(path), none(), length=WINDOW, limit=1)
    assert ran(tmp_path / "b")
    assert same.value == row.value


def test_a_file_that_includes_itself_or_is_too_large_is_one_line(tmp_path: Path) -> None:
    with refused("damaged-file", "includes itself"):
        Harness([HarnessTask(lay(tmp_path, "include: own.yaml\ntask: own\n"))])
    with refused("too-large", "own.yaml", "values"):
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]\n" for at in range(1, 12)
        )
        Harness([HarnessTask(lay(tmp_path, bomb))])


def test_the_command_line_and_recipes_and_python_ask_alike(
    cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path
) -> None:
    task = lay(tmp_path / "task", RUNS_CODE["included"][0])
    arguments = ("eval", checkpoint, "--suite", "retention", "--data", "book:les-miserables", "--tasks", task)
    said = cli(*arguments).refusal
    assert "if you trust it, give --trust-remote-code" in said
    recipe = write_recipe(tmp_path, SEARCH_4, {"stage": "evaluate", "suites": ["retention"], "tasks": [task]})
    said = cli("extend", checkpoint, "--recipe", recipe, "-o", tmp_path / "run").err
    assert "stage 2 (evaluate): the task file" in said
    assert "--trust-remote-code" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(LongRopeError) as error:
        evaluate(str(checkpoint), suites="retention", data="book:les-miserables", config=EvalConfig(tasks=(task,)))
    assert error.value.code == "untrusted-code"
    assert not ran(tmp_path)
    # With consent, the same recipe is planned as any other.
    assert cli("extend", checkpoint, "--recipe", recipe, "--dry-run", "--trust-remote-code").code == 0


@pytest.mark.parametrize("where", ["recipe", "stage"])
def test_a_recipe_cannot_consent(where: str, cli: Callable[..., Ran], checkpoint: Path, tmp_path: Path) -> None:
    task = lay(tmp_path / "task", RUNS_CODE["function"][0])
    key = {"trust_remote_code": True}
    stage = {"stage": "evaluate", "suites": ["retention"], "tasks": [task]} | (key if where == "stage" else {})
    recipe = write_recipe(tmp_path, SEARCH_4, stage, **(key if where == "recipe" else {}))
    said = cli("extend", checkpoint, "--recipe", recipe, "-o", tmp_path / "run", "--trust-remote-code").refusal
    assert "trust-remote-code; known" in said.replace("_", "-") or "unknown key 'trust_remote_code'" in said
    assert not ran(tmp_path)


def test_consent_in_python_is_an_argument(checkpoint: Path, tmp_path: Path) -> None:
    task = lay(tmp_path, RUNS_CODE["function"][0])
    found = evaluate(
        str(checkpoint),
        suites="retention",
        data="book:les-miserables",
        config=EvalConfig(tasks=(task,), samples=1, task_limit=1),
        load=LoadOptions(trust_remote_code=True),
    )
    assert ran(tmp_path)
    assert any(row.detail.get("task") == "own" for row in found.rows)
