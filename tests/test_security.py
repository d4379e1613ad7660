"""What no file of this repository does with data that others may have made."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("src", "pipelines", "training", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

# Modules that run what they read. Of pickle there is the name of its error, which `torch.load` raises.
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
ALLOWED = {("pickle", "UnpicklingError")}
NAMED_IN_FULL = {("torch", "load"), ("numpy", "load"), ("yaml", "load"), ("shutil", "unpack_archive")}


def problems(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(name.name, None) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", name.name) for name in node.names]
        else:
            names = []
        for module, name in names:
            if module.partition(".")[0] in UNSAFE_MODULES and (module, name) not in ALLOWED:
                yield f"line {node.lineno} imports {module}"
            if (module, name) in NAMED_IN_FULL:
                yield f"line {node.lineno} imports {name} from {module}: written {module}.{name} it is seen below"
        if isinstance(node, ast.Call):
            options = {option.arg: getattr(option.value, "value", ...) for option in node.keywords}
            function = ast.unparse(node.func)
            if (
                function in ("torch.load", "torch.hub.load_state_dict_from_url")
                and options.get("weights_only") is not True
            ):
                yield f"line {node.lineno} calls {function} without weights_only=True"
            if options.get("allow_pickle", False) is not False:
                yield f"line {node.lineno} lets {function} read pickles"
            if function.endswith(("extractall", "unpack_archive")) and options.get("filter") != "data":
                yield f"line {node.lineno}: {function} lets names of an archive leave their folder"
            if function in ("eval", "exec", "yaml.load", "yaml.unsafe_load") or function.endswith("torch.hub.load"):
                yield f"line {node.lineno} calls {function}"
            if options.get("trust_remote_code", False) is not False:
                yield f"line {node.lineno} trusts code from elsewhere"


def test_nothing_read_is_run():
    """A way to run a stranger's code by a file of theirs, or to write outside of the folder an archive belongs to."""
    found = {path.relative_to(ROOT).as_posix(): list(problems(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert len(found) > 100
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill.source",
        "from pickle import load",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "torch.hub.load_state_dict_from_url(url)",
        "torch.hub.load('repository', 'model')",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "archive.extractall(folder, filter='fully_trusted')",
        "shutil.unpack_archive(path)",
        "yaml.load(text)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_rules_are_kept(source):
    """A rule above that lets pass what it is there to find."""
    assert list(problems(source))
