"""The names of `import longrope`: all there, light to import, documented, the same for type checkers."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

import longrope
from longrope.errors import LongRopeError
from longrope.rope import closed_forms
from longrope.rope.geometry import RopeGeometry

JOBS = """search_scaling recover_scaling apply_scaling remove_scaling scaled evaluate perplexity token_nll generate
prefill finetune export_checkpoint diagnose inspect_model plan load_scaling preset load_data""".split()
TYPES = """RopeScaling Window RopeGeometry SearchConfig EvalConfig FinetuneConfig ExportConfig LoadOptions EvalResults
Callbacks LongRopeError LongRoPEModel""".split()
CLOSED_FORMS = "pi ntk ntk_critical yarn llama3".split()
PRIVATE = re.compile(r"\b_\w+")


def test_the_names_are_these() -> None:
    assert set(longrope.__all__) == {*JOBS, *TYPES, *CLOSED_FORMS}
    assert set(longrope.__all__) <= set(dir(longrope))
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", longrope.__version__)
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        longrope.magic  # noqa: B018


def test_type_checkers_see_what_is_imported() -> None:
    tree = ast.parse(Path(longrope.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.name, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == {(name, f"longrope.{module}") for name, module in longrope._MODULES.items()}


@pytest.mark.parametrize("name", longrope.__all__)
def test_a_name_is_documented_and_takes_no_private_type(name: str) -> None:
    value = getattr(longrope, name)
    first = inspect.getdoc(value).splitlines()[0]
    assert first[0].isupper() or first[0] == "`", first
    assert first.endswith((".", ":")), first
    if not inspect.isclass(value):
        shown = [str(parameter.annotation) for parameter in inspect.signature(value).parameters.values()]
        assert not [annotation for annotation in shown if PRIVATE.search(annotation)]


@pytest.mark.parametrize("name", sorted(longrope._DEPRECATED))
def test_an_old_name_still_works_and_says_so(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"longrope\.{name} is deprecated: "):
        assert callable(getattr(longrope, name))
    assert name not in dir(longrope)


def test_import_is_light() -> None:
    code = (
        "import sys, longrope; dir(longrope); print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_command_line_is_a_module_too() -> None:
    ran = subprocess.run([sys.executable, "-m", "longrope", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"longrope {longrope.__version__}"


CONFIG = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=4096, rope_theta=1e4)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("pi", closed_forms.pi),
        ("ntk", closed_forms.ntk_aware),
        ("ntk_critical", closed_forms.ntk_critical),
        ("yarn", closed_forms.yarn),
        ("llama3", lambda geometry, target: closed_forms.llama3(geometry, target / 4096)),
    ],
)
def test_a_closed_form_is_a_scaling(name: str, formula: object) -> None:
    geometry = RopeGeometry.from_config(CONFIG)
    scaling = getattr(longrope, name)(CONFIG, "32k")
    (window,) = scaling.windows
    assert (scaling.geometry, window.max_length) == (geometry, 32768)
    np.testing.assert_array_equal(window.factors, formula(geometry, 32768))  # type: ignore[operator]
    assert window.attention_factor == (closed_forms.yarn_attention_factor(geometry, 32768) if name == "yarn" else 1.0)
    assert scaling.windows == getattr(longrope, name)(geometry, 32768).windows
    with pytest.raises(LongRopeError, match="must not be below the original window"):
        getattr(longrope, name)(CONFIG, "2k")
    assert getattr(longrope, name)(CONFIG, "2k", original_length="1k").geometry.original_length == 1024


def test_a_closed_form_of_a_name_says_what_to_give() -> None:
    with pytest.raises(LongRopeError) as error:
        longrope.yarn("Qwen/Qwen2.5-7B-Instruct", "128k")
    assert error.value.code == "not-loaded"


def test_a_scaling_is_loaded_from_its_file_or_folder(tmp_path: Path) -> None:
    scaling = longrope.yarn(CONFIG, "32k")
    scaling.save(tmp_path / "scaling.json")
    assert longrope.load_scaling(tmp_path / "scaling.json") == longrope.load_scaling(str(tmp_path)) == scaling
    assert repr(scaling) == (
        "RopeScaling(4096 → 32768 tokens, rotary_dim 128, yarn:\n"
        "  Window(max_length=32768, factors=(1 … 8), 64 pairs, attention_factor=1.208))"
    )
    with pytest.raises(LongRopeError) as error:
        longrope.load_scaling(tmp_path / "none.json")
    assert error.value.code == "missing-scaling"
