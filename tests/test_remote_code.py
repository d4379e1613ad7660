"""Pipelines that carry their code, as people load them who do not have this package."""

import ast
import builtins
import dis
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import CodeType

import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler
from hub_stand_in import UPLOAD, Client, HubStandIn
from huggingface_hub import ModelCard
from runs import short_run
from safetensors.torch import load_file
from token_models import build_generator

from flowmo_diffusers import FlowMoGenerationPipeline, FlowMoPipeline, FlowMoTokenScheduler
from flowmo_diffusers.assets import starter
from flowmo_diffusers.hub import remote_code, single_file
from flowmo_diffusers.hub.cards import write_model_card
from flowmo_diffusers.hub.remote_code import export_remote_code
from flowmo_diffusers.models.attention_by_products import OPERATOR


# This package is not to be found, however it is installed.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flowmo_diffusers":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
try:
    import flowmo_diffusers
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package is here")
import diffusers, torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from safetensors.torch import save_file
before = set(LOADABLE_CLASSES)
def load(source, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe
"""

RECONSTRUCT = """
def seed(number):
    return torch.Generator().manual_seed(number)
def reconstruct(pipe):
    images = torch.rand(2, 3, 16, 16, generator=seed(0)) * 2 - 1
    output = pipe(images, num_inference_steps=3, generator=seed(1), output_type="pt")
    tokens = pipe.encode(images)
    codes = pipe.autoencoder.indices_to_codes(tokens)
    packed = pipe.autoencoder.pack_codes(codes)
    decoded = pipe.decode(packed, num_inference_steps=2, generator=seed(2), output_type="pt")
    return {"images": output.images, "indices": output.indices, "tokens": tokens, "decoded": decoded}
def generate(pipe):
    arguments = dict(num_inference_steps=8, guidance_scale=2.0, decoder_num_inference_steps=2, output_type="pt")
    output = pipe(class_labels=[0, None, "bird"], generator=seed(3), **arguments)
    return {"images": output.images, "indices": output.indices}
"""

names = {"torch": torch}
exec(RECONSTRUCT, names)
reconstruct, generate = names["reconstruct"], names["generate"]


def stranger(code: str, *arguments: str | Path, home: Path) -> subprocess.CompletedProcess:
    """Runs code in a process that has diffusers and not this package, and prints what went wrong."""
    command = [sys.executable, "-c", WITHOUT_PACKAGE + RECONSTRUCT + code, *map(str, arguments)]
    environment = os.environ | {"HF_HOME": str(home / "hf_home")}
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(params=["masked", "autoregressive"])
def generation_pipeline(request, tiny_pipeline) -> FlowMoGenerationPipeline:
    generator = build_generator(order=request.param, id2label={0: "cat", 1: "dog", 2: "bird"})
    return FlowMoGenerationPipeline(generator, FlowMoTokenScheduler(), **tiny_pipeline.components)


def assert_equal(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> None:
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        assert torch.equal(there[name], tensor), name


@pytest.mark.slow
def test_reconstructions_are_ours(tmp_path, tiny_pipeline):
    """A pipeline that needs this package after all, or computes, warns of or registers anything that ours does not."""
    tiny_pipeline.save_pretrained(tmp_path / "ours")
    export_remote_code(tiny_pipeline, tmp_path / "theirs")
    code = """
for dtype in (torch.float32, torch.bfloat16):
    pipe = load("theirs", dtype=dtype)
    save_file(reconstruct(pipe), f"{dtype}.safetensors")
assert set(LOADABLE_CLASSES) == before and not any(name.startswith("flowmo_diffusers") for name in sys.modules)
"""
    done = stranger(code, home=tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = FlowMoPipeline.from_pretrained(tmp_path / "ours", dtype=dtype)
        assert_equal(load_file(tmp_path / f"{dtype}.safetensors"), reconstruct(pipeline))
    assert "Expected types" not in done.stderr and "might require" not in done.stderr


@pytest.mark.slow
def test_generated_images_are_ours(tmp_path, tiny_pipeline, generation_pipeline):
    """As above, of a generator; or pipelines of one process whose code, of files of one name, gets mixed up."""
    generation_pipeline.save_pretrained(tmp_path / "ours")
    export_remote_code(generation_pipeline, tmp_path / "theirs")
    export_remote_code(tiny_pipeline, tmp_path / "tokenizer")
    code = """
tokenizer = load("tokenizer")
first = reconstruct(tokenizer)
save_file(generate(load("theirs")), "generated.safetensors")
again = reconstruct(tokenizer)
assert all(torch.equal(first[name], again[name]) for name in first)
"""
    stranger(code, home=tmp_path)
    pipeline = FlowMoGenerationPipeline.from_pretrained(tmp_path / "ours")
    assert_equal(load_file(tmp_path / "generated.safetensors"), generate(pipeline))


@pytest.mark.slow
def test_from_the_hub_and_its_cache(tmp_path, tiny_pipeline):
    """Code that an upload leaves out, that diffusers does not fetch from the Hub, or that the cache lacks offline."""
    tiny_pipeline.save_pretrained(tmp_path / "ours")
    export_remote_code(tiny_pipeline, tmp_path / "theirs")
    code = WITHOUT_PACKAGE + RECONSTRUCT + 'save_file(reconstruct(load("anna/birds")), "online.safetensors")'
    # By its id diffusers asks the Hub which version the code is of, even offline.
    offline = (
        WITHOUT_PACKAGE
        + RECONSTRUCT
        + """
from huggingface_hub import snapshot_download
save_file(reconstruct(load(snapshot_download("anna/birds"))), "offline.safetensors")
"""
    )
    with HubStandIn() as hub:
        client = Client(hub, tmp_path)
        done = client(UPLOAD, tmp_path / "theirs", "anna/birds")
        assert done.returncode == 0, done.stderr
        assert {path.relative_to(tmp_path / "theirs").as_posix() for path in files(tmp_path / "theirs")} == set(
            hub.content("anna/birds")
        )
        done = client(code, HF_TOKEN=None)
        assert done.returncode == 0, done.stderr
        requests = len(hub.requests)
        done = client(offline, HF_TOKEN=None, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert len(hub.requests) == requests
    expected = reconstruct(FlowMoPipeline.from_pretrained(tmp_path / "ours"))
    for name in ("online", "offline"):
        assert_equal(load_file(tmp_path / f"{name}.safetensors"), expected)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def code_objects(code: CodeType) -> list[CodeType]:
    return [code, *(inner for part in code.co_consts if isinstance(part, CodeType) for inner in code_objects(part))]


def test_files(tmp_path, generation_pipeline):
    """A file that differs from run to run, imports this package or one that few have, or lacks a name it uses."""
    export_remote_code(generation_pipeline, tmp_path / "first")
    export_remote_code(generation_pipeline, tmp_path / "again")
    written = [path.relative_to(tmp_path / "first") for path in files(tmp_path / "first")]
    assert written == [path.relative_to(tmp_path / "again") for path in files(tmp_path / "again")]
    for path in written:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    code_files = [path for path in written if path.suffix == ".py"]
    assert [path.as_posix() for path in code_files] == [
        "autoencoder/autoencoder_flowmo.py",
        "generator/token_generator.py",
        "pipeline_generation.py",
        "scheduler/scheduling_flowmo.py",
        "token_scheduler/scheduling_flowmo_tokens.py",
    ]
    known = {"torch", "diffusers", "numpy", "PIL"} | sys.stdlib_module_names
    for path in code_files:
        source = (tmp_path / "first" / path).read_text()
        assert source.startswith("# Part of flowmo_diffusers 0") and "Apache License, Version 2.0" in source
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert {module.partition(".")[0] for module in modules} <= known
        # The names that its functions look up in the module, and those that the module gets when it is run.
        module = compile(tree, str(path), "exec")
        steps = [step for code in code_objects(module) for step in dis.get_instructions(code)]
        used = {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}
        bound = {step.argval for step in dis.get_instructions(module) if step.opname == "STORE_NAME"}
        assert len(used) > 5 and used <= bound | vars(builtins).keys(), (path, used - bound)
    assert "class FlowMoAutoencoder" not in (tmp_path / "first" / "pipeline_generation.py").read_text()


def test_nothing_private_is_written(tmp_path, tiny_pipeline):
    """The folder of this machine that a pipeline was loaded from, in a file that is to be published."""
    tiny_pipeline.save_pretrained(tmp_path / "private")
    export_remote_code(FlowMoPipeline.from_pretrained(tmp_path / "private"), tmp_path / "public")
    for path in files(tmp_path / "public"):
        assert b"private" not in path.read_bytes() or path.suffix == ".py", path


def test_what_cannot_be_exported(tmp_path, tiny_pipeline, tiny_autoencoder):
    """A folder of which the code is missing, or that mixes both layouts."""
    foreign = FlowMoPipeline(tiny_autoencoder, DDIMScheduler())
    partial = FlowMoPipeline(None, tiny_pipeline.scheduler)
    for pipeline, message in (
        (foreign, "its scheduler is a DDIMScheduler of diffusers"),
        (partial, "its autoencoder is missing"),
        (tiny_autoencoder, "is a FlowMoAutoencoder; expected a FlowMoPipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            export_remote_code(pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tiny_pipeline.save_pretrained(tmp_path / "standard")
    before = {path: path.read_bytes() for path in files(tmp_path / "standard")}
    with pytest.raises(ValueError, match="name another one"):
        export_remote_code(tiny_pipeline, tmp_path / "standard")
    assert {path: path.read_bytes() for path in files(tmp_path / "standard")} == before


@pytest.mark.slow
def test_command_with_card(tmp_path, tiny_pipeline):
    """A card that is lost, or whose snippet does not run where this package is not."""
    folder = tmp_path / "birds"
    tiny_pipeline.save_pretrained(folder)
    PIL.Image.new("RGB", (8, 8)).save(folder / "some birds.png")
    (folder / "metrics.json").write_text("{}")
    (folder / "diary.txt").touch()
    run = short_run("anna/photos")
    write_model_card(folder, tiny_pipeline, run, [folder / "some birds.png"], 'anna/"birds"', "mit")
    remote_code.main([str(folder), str(tmp_path / "with code")])
    written = {path.relative_to(tmp_path / "with code").as_posix() for path in files(tmp_path / "with code")}
    assert {"README.md", "some birds.png", "metrics.json", "pipeline_flowmo.py"} <= written
    assert "diary.txt" not in written
    card = ModelCard.load(tmp_path / "with code" / "README.md")
    assert card.data.to_dict() == ModelCard.load(folder / "README.md").data.to_dict()
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert "With the package" not in card.text and "flowmo_diffusers import" not in snippet
    PIL.Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / "photo.jpg")
    stranger(snippet, home=tmp_path)
    assert PIL.Image.open(tmp_path / "decoded.png").size == (16, 16)


def test_unusable_arguments(tmp_path, capsys):
    """A traceback instead of a message."""
    with pytest.raises(SystemExit):
        remote_code.main([str(tmp_path / "absent"), str(tmp_path / "out")])
    assert "absent" in capsys.readouterr().err


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Writes modules of a package "toy", and joins what its class `top.Top` needs."""

    def join(**modules: str) -> str:
        (tmp_path / "toy").mkdir()
        for name, source in ({"__init__": ""} | modules).items():
            (tmp_path / "toy" / f"{name}.py").write_text(f'"""The module {name}."""\n' + source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(single_file, "PACKAGE", "toy")
        return single_file.single_file(importlib.import_module("toy.top").Top)

    yield join
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


def test_joining_takes_what_is_needed(toy):
    """Code that is lost, with its comments, or that is taken along for nothing."""
    source = toy(
        low="import os, math\n\n\n# why\nTWO = 2  # here\nTHREE = math.pi\nREGISTERED = []\n\n\n"
        "def plain():\n    return os.sep\n\n\nREGISTERED.append(plain)\n\n\n"
        "def keep(function):\n    REGISTERED.append(function)\n\n\n@keep\ndef _():\n    return 7\n",
        top="from math import pi, tau\n\nfrom toy.low import REGISTERED, TWO, THREE, keep\n\n\n"
        "class Top:\n    def value(self):\n        return TWO * tau, REGISTERED, keep\n\n"
        "    # as published\n    @staticmethod\n    def from_published():\n        return THREE\n\n    y = 1\n",
    )
    names: dict = {}
    exec(source, names)
    value, registered, _ = names["Top"]().value()
    assert value == 2 * names["tau"] and [function() for function in registered] == [os.sep, 7]
    assert "# why\nTWO = 2  # here" in source and names["Top"].y == 1
    assert not {"THREE", "pi", "math"} & names.keys() and "from_published" not in source


def test_one_name_for_two_things(toy):
    """One definition that silently takes the place of another."""
    with pytest.raises(ValueError, match="helper is defined in toy.low and in toy.top: .*rename one"):
        toy(
            low="def helper():\n    return 1\n\n\ndef low():\n    return helper()\n",
            top="from toy.low import low\n\n\ndef helper():\n    return 2\n\n\n"
            "class Top:\n    def value(self):\n        return low() + helper()\n",
        )


def test_operators_of_the_package_stay(tmp_path):
    """Would catch exported code that, loaded beside the package, takes the place of its operators."""
    export_remote_code(FlowMoPipeline.from_pretrained(starter()), tmp_path / "code")
    source = (tmp_path / "code" / "autoencoder" / "autoencoder_flowmo.py").read_text()
    assert OPERATOR.name().replace("flowmo_diffusers::", "flowmo_diffusers_remote::") in source
    assert OPERATOR.name() not in source and "torch.ops.flowmo_diffusers." not in source
