"""The command `flowmo`, in this process but for what only another can show."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from flowmo_diffusers import FlowMoPipeline
from flowmo_diffusers.assets import starter
from flowmo_diffusers.cli import encode, main, options
from flowmo_diffusers.cli.main import COMMANDS, build_parser
from flowmo_diffusers.data.token_file import TokenFile
from flowmo_diffusers.data.tokens import tokenizer_identity
from flowmo_diffusers.metrics.reconstruction import psnr
from flowmo_diffusers.models.windows import Windows
from flowmo_diffusers.pipelines.images import images_to_tensor


ROOT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).parent / "flowmo"
FAST = ("--steps", 2, "--batch_size", 2)


def flowmo(*words) -> int:
    return main.main([str(word) for word in words])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path)).astype(int)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two images, one more in a folder, and what is none."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("a.png", (32, 32)), ("b.jpg", (50, 40)), ("sub/c.png", (40, 36))):
        coarse = PIL.Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(size, PIL.Image.Resampling.BICUBIC).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_reconstruct(photos, tmp_path, capsys):
    """The figures are those of the pictures that were written."""
    out = tmp_path / "out"
    assert flowmo("reconstruct", photos, "--output", out, *FAST) == 0
    assert below(out) == ["a.png", "b.png", "sub/c.png"]
    printed = capsys.readouterr().out
    x, y = (images_to_tensor(PIL.Image.open(folder / "a.png")) for folder in (photos, out))
    line = next(line for line in printed.splitlines() if line.startswith(str(photos / "a.png")))
    assert "32 x 32 pixels, 1536 bits = 192 bytes (1.5 a pixel)" in line
    assert float(re.search(r"PSNR ([\d.]+) dB", line)[1]) == pytest.approx(psnr(x, y).item(), abs=0.006)
    each = [float(value) for value in re.findall(r" PSNR ([\d.]+) dB, \d", printed)]
    mean = float(re.search(r"mean PSNR ([\d.]+) dB", printed)[1])
    assert len(each) == 3 and mean == pytest.approx(sum(each) / 3, abs=0.011)


def test_compare_is_the_original_beside_the_reconstruction(photos, tmp_path):
    for name, more in (("alone", []), ("both", ["--compare"])):
        assert flowmo("reconstruct", photos / "a.png", "--output", tmp_path / f"{name}.png", *FAST, *more) == 0
    both = pixels(tmp_path / "both.png")
    assert np.array_equal(both[:, :32], pixels(photos / "a.png"))
    assert np.array_equal(both[:, 32:], pixels(tmp_path / "alone.png"))


def test_encode_and_decode_are_reconstruct(photos, tmp_path):
    """The same seed gives the same image, alone as among others; another seed another."""
    tokens, images = tmp_path / "tokens", tmp_path / "images"
    assert flowmo("encode", photos, "--output", tokens) == 0
    assert below(tokens) == ["a.flowmo", "b.flowmo", "sub/c.flowmo"]
    file = TokenFile.read(tokens / "a.flowmo")
    pipeline = FlowMoPipeline.from_pretrained(starter())
    indices = pipeline.encode(PIL.Image.open(photos / "a.png"))
    assert file.packed == pipeline.autoencoder.pack_codes(pipeline.autoencoder.indices_to_codes(indices))
    assert (file.height, file.width, file.name) == (32, 32, "starter")
    file.check_tokenizer(tokenizer_identity(pipeline.autoencoder))

    assert flowmo("decode", tokens, "--output", images, *FAST) == 0
    assert flowmo("reconstruct", photos, "--output", tmp_path / "direct", *FAST) == 0
    for name in ("a.png", "b.png", "sub/c.png"):
        assert np.array_equal(pixels(images / name), pixels(tmp_path / "direct" / name))
    for seed in (0, 1):
        target = tmp_path / f"{seed}.png"
        assert flowmo("decode", tokens / "sub/c.flowmo", "--output", target, "--seed", seed, *FAST) == 0
    difference = [np.abs(pixels(tmp_path / f"{seed}.png") - pixels(images / "sub/c.png")).max() for seed in (0, 1)]
    assert difference[0] <= 1 < difference[1]  # 1: rounding in another batch


def test_a_tokenizer_is_known_by_its_weights(photos, tmp_path):
    """Tokens of one folder decoded by a copy elsewhere, with another decoder, in another dtype and by another grid."""
    pipeline = FlowMoPipeline.from_pretrained(starter())
    with torch.no_grad():
        pipeline.autoencoder.decoder.patch_in.weight += 0.01
    pipeline.save_pretrained(tmp_path / "copy")
    assert flowmo("encode", photos / "a.png", "--output", tmp_path / "a.flowmo") == 0
    options = ("--model", tmp_path / "copy", "--dtype", "bfloat16", "--rho", 2)
    assert flowmo("decode", tmp_path / "a.flowmo", "--output", tmp_path / "a.png", *options, *FAST) == 0


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], (32, 32)),
        (["--resolution", "16x24"], (16, 24)),
        (["--height", "24", "--width", "16"], (24, 16)),
        (["--keep_size"], (40, 48)),
    ],
)
def test_sizes(photos, tmp_path, words, size):
    """Images of another size than was asked for; a size that is lost between encoding and decoding."""
    assert flowmo("encode", photos / "b.jpg", "--output", tmp_path / "b.flowmo", *words) == 0
    assert flowmo("decode", tmp_path / "b.flowmo", "--output", tmp_path / "b.png", *FAST) == 0
    assert pixels(tmp_path / "b.png").shape == (*size, 3)


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        (["--windows"], {"window_size": 32, "window_overlap": 8}),
        (["--window_size", 16, "--window_overlap", 0], {"window_size": 16, "window_overlap": 0}),
        (["--window_overlap", 5], {"window_size": 32, "window_overlap": 5}),
    ],
)
@pytest.mark.parametrize("batch", [[], ["--window_batch_size", 3]])
def test_windows_are_those_of_the_pipeline(photos, tmp_path, capsys, words, layout, batch):
    """Every pixel of images smaller and larger than a window, bit for bit, from an exact number of bytes that tell the
    windows; defaults that differ from the pipeline's; an option that does not arrive."""
    small = photos / "small.png"
    PIL.Image.open(photos / "b.jpg").resize((21, 9)).save(small)
    pipeline = FlowMoPipeline.from_pretrained(starter())
    for photo, size in ((photos / "b.jpg", (40, 50)), (small, (9, 21)), (photos / "a.png", (32, 32))):
        tokens, decoded, direct = (tmp_path / f"{photo.stem}.{kind}" for kind in ("flowmo", "png", "direct.png"))
        assert flowmo("encode", photo, "--output", tokens, *words, *batch) == 0
        assert flowmo("decode", tokens, "--output", decoded, "--steps", 2, *batch) == 0
        assert flowmo("reconstruct", photo, "--output", direct, "--steps", 2, *words, *batch) == 0
        printed = capsys.readouterr().out
        windows = len(Windows(*size, *layout.values()))
        num_bytes = 192 * windows
        text = f"{size[0]} x {size[1]} pixels in {windows} window{'s' if windows > 1 else ''}"
        assert f"{text}, {num_bytes + 50} bytes\n" in printed and tokens.stat().st_size == num_bytes + 50
        assert f"{text}, {8 * num_bytes} bits = {num_bytes} bytes (" in printed

        output = pipeline(
            PIL.Image.open(photo),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            window_batch_size=batch[-1] if batch else 8,
            **layout,
        )
        file, autoencoder = TokenFile.read(tokens), pipeline.autoencoder
        assert (file.num_rows, file.windows) == (windows, layout)
        assert file.packed == autoencoder.pack_codes(autoencoder.indices_to_codes(output.indices[0]))
        for path in (decoded, direct):
            assert np.array_equal(pixels(path), np.asarray(output.images[0]))


def test_files_of_one_size_and_other_windows(photos, tmp_path):
    """Decoded in one batch, by the first one's windows; windows of several images that are mixed up."""
    tokens = tmp_path / "tokens"
    for name, words in (("a", []), ("b", ["--window_size", 16]), ("c", ["--windows"])):
        assert flowmo("encode", photos / "a.png", "--output", tokens / f"{name}.flowmo", *words) == 0
    assert flowmo("decode", tokens, "--output", tmp_path / "images", *FAST) == 0
    whole, sixteen, one = (pixels(tmp_path / "images" / f"{name}.png") for name in "abc")
    assert np.abs(whole - one).max() <= 1 < np.abs(whole - sixteen).max()

    PIL.Image.open(photos / "a.png").rotate(90).save(photos / "a2.png")
    assert flowmo("encode", photos, "--output", tmp_path / "together", "--window_size", 16, *FAST[2:]) == 0
    assert TokenFile.read(tmp_path / "together" / "a.flowmo") == TokenFile.read(tokens / "b.flowmo")
    assert flowmo("decode", tmp_path / "together", "--output", tmp_path / "back", *FAST) == 0
    assert np.abs(pixels(tmp_path / "back" / "a.png") - sixteen).max() <= 1


@pytest.mark.parametrize(
    ("words", "size"), [(["--resolution", "23x50"], (23, 50)), (["--height", "9", "--width", "50"], (9, 50))]
)
def test_windows_of_resized_images(photos, tmp_path, words, size):
    """A size that is asked for and not given, or rounded to patches."""
    assert flowmo("encode", photos / "b.jpg", "--output", tmp_path / "b.flowmo", "--windows", *words) == 0
    file = TokenFile.read(tmp_path / "b.flowmo")
    assert (file.height, file.width, file.window) == (*size, 32)


def test_images_of_too_many_windows_are_named(photos, tmp_path, capsys):
    """A file that cannot be written, which is found out when its image has been encoded, or ends the command."""
    PIL.Image.new("RGB", (2000, 2000)).save(photos / "large.png")
    words = ("--window_size", 4, "--window_overlap", 0)
    assert flowmo("encode", photos / "large.png", photos / "a.png", "--output", tmp_path / "out", *words) == 1
    assert below(tmp_path / "out") == ["a.flowmo"]
    assert "large.png: 250000 windows are more than the 65535 of a token file" in capsys.readouterr().err


def test_bad_images_are_named_and_the_others_encoded(photos, tmp_path, capsys):
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert flowmo("encode", photos, "--output", tmp_path / "out") == 1
    assert below(tmp_path / "out") == ["a.flowmo", "b.flowmo", "sub/c.flowmo"]
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and str(photos / "bad.jpg") in shown.err
    assert "1 failed" in shown.out


def test_files_that_exist_are_kept(photos, tmp_path, capsys):
    """A photo that a decoded one would replace; `--overwrite` that does not write."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.flowmo").write_bytes(b"mine")
    assert flowmo("encode", photos, "--output", out) == 0
    assert (out / "a.flowmo").read_bytes() == b"mine" and (out / "b.flowmo").exists()
    assert "1 kept" in capsys.readouterr().out
    assert flowmo("encode", photos, "--output", out, "--overwrite") == 0
    assert TokenFile.read(out / "a.flowmo").num_tokens == 64


def test_what_is_no_token_file_of_this_model_is_refused(photos, tmp_path, tiny_pipeline, capsys):
    """Damaged and foreign files, another tokenizer's, windows, odd sizes: each is named, the rest decoded."""
    tokens = tmp_path / "tokens"
    assert flowmo("encode", photos / "a.png", "--output", tokens) == 0
    good = TokenFile.read(tokens / "a.flowmo")
    fields = vars(good)
    (tokens / "cut.flowmo").write_bytes(good.to_bytes()[:-9])
    (tokens / "foreign.flowmo").write_bytes(b"\x89PNG and so on")
    TokenFile(**fields | {"height": 30}).write(tokens / "odd.flowmo")
    TokenFile(**fields | {"window": 34}).write(tokens / "windows.flowmo")
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    assert flowmo("encode", photos / "a.png", "--model", tmp_path / "tiny", "--output", tokens / "tiny.flowmo") == 0
    capsys.readouterr()
    assert flowmo("decode", tokens, "--output", tmp_path / "images", *FAST) == 1
    assert below(tmp_path / "images") == ["a.png"]
    errors = capsys.readouterr().err.splitlines()
    reasons = {
        "cut": "cut off: 233 bytes of 242",
        "foreign": "not a FlowMo token file",
        "odd": "height=30 and width=32 must be positive multiples of the patch size 4, or .*",
        "tiny": r"tokens of another tokenizer: \w{32} \(tiny\), not 6bdb010e641ced8e9e542c24e3a68599",
        "windows": "window_size=34 must be a multiple of the patch size 4",
    }
    assert len(errors) == len(reasons)
    for line, (name, reason) in zip(errors, reasons.items(), strict=True):
        assert re.fullmatch(rf".*{name}\.flowmo: {reason}", line)


def test_generate(tmp_path, capsys):
    """By number, name and none; image k of a class is the same among others; its tokens give it back but for noise."""
    sampling = ("--steps", 4, "--decoder_steps", 4, "--guidance_scale", 2)
    out = tmp_path / "out"
    labels = ("--labels", "Flags", 6, "none", "--num_images", 2)
    assert flowmo("generate", *labels, "--tokens", "--output", out, *sampling) == 0
    names = ["002-flags-0000", "002-flags-0001", "006-smileys-emotion-0000", "006-smileys-emotion-0001"]
    names += ["none-0000", "none-0001"]
    assert below(out) == sorted(name + suffix for name in names for suffix in (".png", ".flowmo"))
    assert not np.array_equal(pixels(out / f"{names[0]}.png"), pixels(out / f"{names[1]}.png"))
    assert flowmo("generate", "--labels", "smileys & emotion", "--output", tmp_path / "alone", *sampling) == 0
    assert np.abs(pixels(tmp_path / "alone" / f"{names[2]}.png") - pixels(out / f"{names[2]}.png")).max() <= 1
    assert flowmo("decode", out / f"{names[0]}.flowmo", "--output", tmp_path / "back.png", "--steps", 4) == 0
    assert np.abs(pixels(tmp_path / "back.png") - pixels(out / f"{names[0]}.png")).mean() < 12
    assert flowmo("generate", "--labels", "Cats", "--output", tmp_path / "none") == 1
    assert "'Cats', which is no class" in capsys.readouterr().err


def test_convert(tmp_path, capsys):
    """There and back; and a file that is no checkpoint."""
    checkpoint = ROOT / "tests/parity/lfq_lo/checkpoint.pth"
    told = ("--rope_axes", 4, 8, 4, "--codebook_bits", 3, "--sample_size", 32, "--num_latent_tokens", 16)
    assert flowmo("convert", checkpoint, tmp_path / "folder", *told) == 0
    FlowMoPipeline.from_pretrained(tmp_path / "folder")
    assert flowmo("convert", tmp_path / "folder", tmp_path / "back.pth") == 0
    assert (tmp_path / "back.pth").stat().st_size > 1000
    assert flowmo("convert", tmp_path / "absent.pth", tmp_path / "other") == 1
    assert "absent.pth does not exist" in capsys.readouterr().err


def test_inspect_shows_a_token_file(photos, tmp_path, capsys):
    assert flowmo("encode", photos / "a.png", "--output", tmp_path / "a.flowmo") == 0
    capsys.readouterr()
    assert flowmo("inspect", tmp_path / "a.flowmo", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokenizer"] == "6bdb010e641ced8e9e542c24e3a68599" and facts["name"] == "starter"
    assert (facts["code_bytes"], facts["file_bytes"], facts["num_rows"]) == (192, 242, 1)
    assert "windows" not in facts
    (tmp_path / "a.flowmo").write_bytes(b"FLOWMO")
    assert flowmo("inspect", tmp_path / "a.flowmo") == 1
    assert flowmo("encode", photos / "b.jpg", "--windows", "--output", tmp_path / "b.flowmo") == 0
    capsys.readouterr()
    assert flowmo("inspect", tmp_path / "b.flowmo") == 0
    shown = capsys.readouterr().out
    assert "height: 40\nwidth: 50\n" in shown and "num_rows: 4\nwindow: 32\noverlap: 8\n" in shown
    assert "windows: 2 x 2 of 32 x 32 pixels\ncode_bytes: 768\nfile_bytes: 818\n" in shown


def test_inspect_shows_a_model(tiny_pipeline, tmp_path, capsys):
    """The embedded generator with its tokenizer, and a folder."""
    assert flowmo("inspect", "starter_generator", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class"] == "FlowMoGenerationPipeline" and facts["classes"]["2"] == "Flags"
    tokenizer = facts["tokenizer"]
    assert tokenizer["tokens"]["bits_per_image"] == 1536 and tokenizer["sampler"]["num_inference_steps"] == 4
    flops, forwards = tokenizer["flops"], tokenizer["sampler"]["forwards"]
    assert forwards == 4 and flops["reconstruction"] == flops["encoder"] + forwards * flops["decoder_forward"]
    tiny_pipeline.save_pretrained(tmp_path / "tiny")
    assert flowmo("inspect", tmp_path / "tiny") == 0
    shown = capsys.readouterr().out
    assert f"  all: {tiny_pipeline.autoencoder.num_parameters():,}\n" in shown and "  bytes_per_image: 6\n" in shown
    assert "  forwards: 31\n" in shown  # six of 25 steps are guided


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: COMMAND"),
        ("encode photos", "required: --output"),
        ("encode photos --output x --batch_size 0", "--batch_size: '0' must be a whole number of at least 1"),
        ("encode photos --output x --height 32", "--height and --width must be given together"),
        ("encode photos --output x --keep_size --resolution 32", "give one of"),
        ("encode photos --output x.flowmo", "is one file, and there are 3 to write"),
        ("decode x --output y --dtype int8", "invalid choice"),
        ("decode x --output y --windows", "unrecognized arguments"),
        ("encode photos --output x --window_size 0", "--window_size: '0' must be a whole number of at least 1"),
        ("reconstruct photos --output x --window_batch_size 2", "--window_batch_size needs --windows"),
        ("reconstruct photos --output x --resolution 3x", "must be a side in pixels"),
    ],
)
def test_wrong_usage_ends_with_2(photos, monkeypatch, capsys, words, message):
    monkeypatch.chdir(photos.parent)
    with pytest.raises(SystemExit) as ended:
        flowmo(*words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("encode absent --output x", "absent does not exist"),
        ("encode empty --output x", "empty holds no files of a kind that is read here"),
        ("encode photos --output x --model ./absent", "absent"),
        ("encode photos --output photos/a.png", "photos/a.png is not a folder"),
        ("encode photos photos/a.png --output x", "photos/a.png and photos/a.png would both be written to x/a.flowmo"),
        ("encode photos --output x --resolution 30", "must be positive multiples of the patch size 4"),
        ("encode photos --output x --window_size 30", "window_size=30 must be a multiple of the patch size 4"),
        ("reconstruct photos --output x --window_overlap 32", "window_overlap=32 must be at least 0 and less than"),
        ("reconstruct photos --output x --rho -1", "rho=-1.0 must be positive"),
        ("reconstruct photos --output x --steps 2 --device nowhere", "--device nowhere cannot be used"),
        ("generate --labels 99 --output x", "class_labels has id 99; this generator has 9 classes"),
        ("inspect ./absent", "absent"),
        ("inspect absent.flowmo", "No such file or directory: 'absent.flowmo'"),
    ],
)
def test_errors_are_one_line(photos, monkeypatch, capsys, words, message):
    """And come before anything is written; `--debug` shows where from."""
    monkeypatch.chdir(photos.parent)
    (photos.parent / "empty").mkdir()
    assert flowmo(*words.split()) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("flowmo ") and shown.err.count("\n") == 1 and message in shown.err
    assert not Path("x").exists()
    with pytest.raises((OSError, ValueError)):
        flowmo(*words.split(), "--debug")


def test_interrupted(photos, tmp_path, monkeypatch, capsys):
    """Ctrl-C ends with 130 and leaves whole files only."""
    write = TokenFile.to_bytes
    calls = []

    def interrupt_the_second(file: TokenFile) -> bytes:
        calls.append(file)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return write(file)

    monkeypatch.setattr(TokenFile, "to_bytes", interrupt_the_second)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests behind
    try:
        assert flowmo("encode", photos, "--output", tmp_path / "out") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert below(tmp_path / "out") == ["a.flowmo"]
    assert capsys.readouterr().err == "flowmo: interrupted\n"


def test_bugs_are_not_hidden(photos, tmp_path, monkeypatch):
    """An error that no input explains keeps its traceback."""

    def broken(args):
        raise TypeError("a bug")

    monkeypatch.setattr(encode, "run", broken)
    with pytest.raises(TypeError):
        flowmo("encode", photos, "--output", tmp_path / "out")


def test_help_needs_no_torch(tmp_path):
    """Seconds of imports before a help page, or before a header is shown."""
    file = tmp_path / "a.flowmo"
    TokenFile(tokenizer="0" * 32, height=4, width=4, num_tokens=1, bits_per_token=8, codes=b"?").write(file)
    names = [module.__name__.rpartition(".")[2] for module in COMMANDS]
    code = f"""
import sys
from flowmo_diffusers.cli.main import main
for words in [["--help"], *([name, "--help"] for name in {names})]:
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 0
assert main(["inspect", {str(file)!r}]) == 0
print(sorted(sys.modules.keys() & {{"torch", "diffusers", "numpy", "datasets"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert all(f"flowmo {name} " in done.stdout for name in names)


def test_examples_are_right():
    """A command in the documentation or the help that its own parser refuses."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/command-line.md")]
    texts += [module.__doc__ for module in COMMANDS]
    examples = re.findall(r"^ *(?:python -m flowmo_diffusers|flowmo) +(\w+ .*)$", "\n".join(texts), flags=re.MULTILINE)
    assert len(examples) > 20
    for example in examples:
        build_parser().parse_args(shlex.split(example, comments=True))


def test_local_folders_go_before_embedded_ones(tiny_pipeline, tmp_path, monkeypatch, capsys):
    tiny_pipeline.save_pretrained(tmp_path / options.STARTER)
    monkeypatch.chdir(tmp_path)
    assert flowmo("inspect", options.STARTER) == 0
    assert "bytes_per_image: 6" in capsys.readouterr().out


@pytest.mark.slow
def test_installed_command(photos, tmp_path):
    """The console script and the module, a reader that closes its pipe, and no word on stderr where all is well."""
    command = [SCRIPT, "encode", photos / "a.png", "--output", tmp_path / "a.flowmo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{photos / 'a.png'} -> {tmp_path / 'a.flowmo'}: 32 x 32 pixels, 242 bytes\n")
    module = [sys.executable, "-m", "flowmo_diffusers", "inspect", tmp_path / "a.flowmo"]
    done = subprocess.run(module, capture_output=True, text=True, check=True)
    assert "tokenizer: 6bdb010e641ced8e9e542c24e3a68599" in done.stdout
    reader = subprocess.Popen(module, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    reader.stdout.close()
    assert reader.stderr.read() == ""
    assert reader.wait() == main.BROKEN_PIPE
