"""Stored tokens: what is written, what is refused, and the order in which they are trained on."""

import json

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from flowmo_diffusers import FlowMoAutoencoder
from flowmo_diffusers.data.arrays import ArrayImages, write_npz
from flowmo_diffusers.data.loading import image_batches
from flowmo_diffusers.data.sources import DatasetImages, FileImages, FolderImages, Labels
from flowmo_diffusers.data.tokenizing import ImageVariants
from flowmo_diffusers.data.tokens import (
    ShuffledTokens,
    check_folder,
    check_tokenizer,
    load_tokens,
    tokenizer_identity,
    write_tokens,
)
from flowmo_diffusers.data.transforms import ImageTransform
from flowmo_diffusers.engine.chunks import Chunks
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.models.quantizers import build_quantizer


IMAGES, VARIANTS, TOKENS = 10, 3, 8


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Of `datasets`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def write(folder, identity, split="train", names=("ant", "bee"), seed=0):
    """Ten images of three variants but for image 4; their indices and classes."""
    quantizer = build_quantizer(**identity["quantizer"])
    number = torch.tensor([n for n in range(IMAGES * VARIANTS) if n // VARIANTS != 4])
    indices = torch.randint(8, (len(number), TOKENS, 2), generator=torch.Generator().manual_seed(seed))
    packed = quantizer.pack(quantizer.indices_to_codes(indices))
    chunks = Chunks(folder / ".rows", {}, IMAGES * VARIANTS, 7)
    for chunk in range(len(chunks)):
        there = torch.isin(number, torch.tensor(chunks.items(chunk)))
        chunks.write(chunk, {"packed": packed[there], "number": number[there]})
    ids = np.arange(IMAGES) % 2
    labels = Labels(ids, list(names) if names else None)
    write_tokens(folder, split, chunks, labels, VARIANTS, {"tokenizer": identity, "settings": {"seed": seed}})
    return indices, torch.from_numpy(ids)[number // VARIANTS]


@pytest.fixture
def identity(tiny_autoencoder):
    return tokenizer_identity(tiny_autoencoder)


@pytest.fixture
def folder(tmp_path, identity):
    write(tmp_path / "tokens", identity)
    return tmp_path / "tokens"


def test_tokens_come_back_as_they_were(tmp_path, identity):
    """Indices, classes, image numbers, in order, each row of exactly tokens x bits / 8 bytes."""
    indices, labels = write(tmp_path, identity)
    tokens = load_tokens(tmp_path)
    assert len(tokens) == len(indices) == 27
    assert torch.equal(tokens.indices(range(27)), indices)
    assert torch.equal(tokens.labels, labels) and tokens.labels.dtype == torch.int64
    assert tokens.images.tolist() == [n // 3 for n in range(30) if n // 3 != 4]
    assert tokens.packed([5, 2]).shape == (2, TOKENS * 6 // 8)
    assert torch.equal(tokens.indices([5, 2]), indices[[5, 2]])
    assert tokens.identity == identity
    assert (tokens.class_names, tokens.num_classes) == (["ant", "bee"], 2)


@pytest.mark.filterwarnings("ignore")
def test_the_folder_is_a_dataset(folder, identity):
    """`datasets.load_dataset` reads it as it is, several splits and a card included, and knows the class names."""
    write(folder, identity, "validation", seed=1)
    (folder / "README.md").write_text("---\ntags:\n- flowmo\n---\n")
    found = datasets.load_dataset(str(folder))
    assert {name: len(split) for name, split in found.items()} == {"train": 27, "validation": 27}
    assert found["train"].features["label"].names == ["ant", "bee"]
    row = found["train"][4]
    assert set(row) == {"codes", "label", "image", "variant"}
    assert (row["label"], row["image"], row["variant"], len(row["codes"])) == (1, 1, 1, 6)


def test_many_rows_are_several_files(tmp_path, identity, monkeypatch):
    """And read in order."""
    monkeypatch.setattr("flowmo_diffusers.data.tokens._FILE_BYTES", 14 * 6)
    indices, _ = write(tmp_path, identity)
    names = [f"train-{number:05}-of-00003.parquet" for number in range(3)]
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == names
    assert torch.equal(load_tokens(tmp_path).indices(range(27)), indices)


def test_damaged_files_are_refused(folder, identity):
    """A flipped bit, another label, a short code, half a file and none: each names the file."""
    (path,) = (folder / "data").glob("*.parquet")
    whole, table = path.read_bytes(), pq.read_table(path)
    rows = table.to_pylist()
    for column, value in (("codes", bytes([rows[3]["codes"][0] ^ 1]) + rows[3]["codes"][1:]), ("label", 1),
                          ("codes", b"123"), ("codes", None)):  # fmt: skip
        changed = [{**row, column: value} if number == 6 else row for number, row in enumerate(rows)]
        assert changed != rows
        pq.write_table(type(table).from_pylist(changed, table.schema), path)
        with pytest.raises(OSError, match=f"{path.name} is damaged"):
            load_tokens(folder)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=f"{path.name} is damaged"):
        load_tokens(folder)
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        load_tokens(folder)


def test_what_is_not_there_is_said(folder, tmp_path):
    """No tokens, no such split, a damaged description."""
    with pytest.raises(OSError, match="holds no finished tokens"):
        load_tokens(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"split='test' does not exist.*\['train'\]"):
        load_tokens(folder, "test")
    (folder / "tokens-train.json").write_text("{")
    with pytest.raises(OSError, match="tokens-train.json is damaged"):
        load_tokens(folder)


def test_identity_is_of_the_encoder(tiny_autoencoder, tiny_config, identity):
    """The decoder and the size of training images have no part in it; the encoder's weights and the grouping have."""
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["num_tokens"], identity["token_groups"], identity["group_bits"]) == (8, 2, 3)
    other = FlowMoAutoencoder(**{**tiny_config, "sample_size": 32, "decoder_num_layers": 1})
    other.encoder.load_state_dict(tiny_autoencoder.encoder.state_dict())
    assert tokenizer_identity(other) == identity
    grouped = FlowMoAutoencoder(**{**tiny_config, "codebook_bits": 2})
    grouped.encoder.load_state_dict(tiny_autoencoder.encoder.state_dict())
    with pytest.raises(ValueError, match="tokens of another tokenizer: digest is .*group_bits is 3 there and 2 here"):
        check_tokenizer(identity, tokenizer_identity(grouped))
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="another tokenizer: digest"):
        check_tokenizer(identity, tokenizer_identity(other))
    check_tokenizer(identity, identity)
    with pytest.raises(ValueError, match=r"torch.bfloat16.*float32"):
        tokenizer_identity(other.to(torch.bfloat16))
    with pytest.raises(ValueError, match="quantizer='kl' has no discrete codes"):
        tokenizer_identity(FlowMoAutoencoder(**{**tiny_config, "quantizer": "kl"}))


def test_a_folder_is_of_one_tokenizer(folder, identity):
    """Other tokenizers, classes and settings are refused; the same split is known to be finished."""
    same = {"tokenizer": identity, "class_names": ["ant", "bee"], "settings": {"seed": 0}}
    assert check_folder(folder, "train", same)
    assert not check_folder(folder, "test", {**same, "settings": {"seed": 1}})
    with pytest.raises(ValueError, match="split 'train' by other settings: seed is 0 there and 1 here"):
        check_folder(folder, "train", {**same, "settings": {"seed": 1}})
    with pytest.raises(ValueError, match="split 'train', tokens of another tokenizer: digest"):
        check_folder(folder, "test", {**same, "tokenizer": {**identity, "digest": "00"}})
    with pytest.raises(ValueError, match="split 'train' with other classes"):
        check_folder(folder, "test", {**same, "class_names": ["ant"]})


def test_held_out_images_are_held_out_with_all_variants(folder):
    """Evenly spread, and never more than there are."""
    rest, held = load_tokens(folder).set_aside(3)
    assert sorted(set(held.images.tolist())) == [0, 3, 7]
    assert len(held) == 9 and len(rest) == 18
    assert not set(held.images.tolist()) & set(rest.images.tolist())
    whole = load_tokens(folder)
    assert torch.equal(rest.indices([5]), whole.indices([8])) and rest.labels[5] == whole.labels[8]
    assert whole.pick(3).images.tolist() == [0, 3, 7]
    with pytest.raises(ValueError, match="9 images cannot be held out of 9: lower --num_validation_images"):
        whole.set_aside(9)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_order_is_a_function_of_seed_and_visit(folder, num_workers):
    """Each row once an epoch, the same on one process and two, and after a restart."""
    tokens = load_tokens(folder)
    visits = ShuffledTokens(tokens, seed=3)
    batches = list(image_batches(visits, 9, 0, 6, num_workers=num_workers))
    assert {name: (tuple(v.shape), v.dtype) for name, v in batches[0].items() if name != "bad"} == {
        "packed": ((9, 6), torch.uint8),
        "labels": ((9,), torch.int64),
        "visits": ((9,), torch.int64),
    }
    assert all(batch["bad"] == [] for batch in batches)
    numbers = [visits.number(visit) for visit in range(54)]
    assert sorted(numbers[:27]) == sorted(numbers[27:]) == list(range(27)) and numbers[:27] != numbers[27:]
    assert torch.equal(torch.cat([batch["packed"] for batch in batches]), tokens.packed(numbers))
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), tokens.labels[numbers])
    parts = [list(image_batches(ShuffledTokens(tokens, seed=3), 9, 1, 3, process, 2)) for process in (0, 1)]
    joint = [parts[process][step]["packed"] for step in (0, 1) for process in (0, 1)]
    assert all(torch.equal(part, batch["packed"]) for part, batch in zip(joint, batches[2:], strict=True))


@pytest.mark.parametrize(("name", "levels", "bits"), [("lfq", 2, 3), ("fsq", 8, 6)])
def test_packed_codes_are_big_endian_bits(name, levels, bits):
    """As numpy.packbits has it, with padding, and back."""
    quantizer = build_quantizer(name, 6, bits, levels)
    indices = torch.randint(2**bits, (4, 3, quantizer.groups), generator=torch.Generator().manual_seed(0))
    codes = quantizer.indices_to_codes(indices)
    width = quantizer.bits_per_channel
    text = [
        "".join(f"{level:0{width}b}" for level in row) for row in quantizer.codes_to_levels(codes).flatten(1).tolist()
    ]
    expected = np.packbits([[int(bit) for bit in row] for row in text], axis=1)
    packed = quantizer.pack(codes)
    assert packed.dtype == torch.uint8 and np.array_equal(packed.numpy(), expected)
    assert torch.equal(quantizer.unpack(packed, 3), codes)
    assert torch.equal(quantizer.packed_to_indices(packed, 3), indices)
    for wrong in (packed[:, 1:], packed.int(), packed[0]):
        with pytest.raises(ValueError, match="packed codes are .* expected"):
            quantizer.unpack(wrong, 3)


def test_variants_are_crops_and_their_mirror_images(tmp_path):
    """The centre crop first, random ones by (seed, image, crop), and then the same mirrored."""
    random = np.random.default_rng(0)
    for number in range(3):
        PIL.Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / f"{number}.png")
    source = FolderImages([tmp_path])
    variants = ImageVariants(source, 16, num_crops=3, random_scale=1.5, flip=True, seed=5)
    assert (len(variants), variants.variants) == (18, 6)
    drawn = ImageTransform(16, random_crop=True, max_scale=1.5)
    for image in (2, 0):
        found = [variants.pixels(image * 6 + variant) for variant in range(6)]
        assert torch.equal(found[0], ImageTransform(16)(source[image]))
        for crop in (1, 2):
            assert torch.equal(found[crop], drawn(source[image], keyed_generator(5, f"crop {crop}", image)))
        assert not torch.equal(found[1], found[2])
        assert all(torch.equal(found[3 + crop], found[crop].flip(-1)) for crop in range(3))
    assert variants.name(8).endswith("1.png (variant 2)")
    assert ImageVariants(source, 16, seed=1).description == ImageVariants(source, 16, seed=2).description
    assert variants.description != ImageVariants(source, 16, 3, 1.5, True, seed=6).description


def picture():
    return PIL.Image.new("RGB", (4, 4))


def test_labels_of_data_sets():
    """Classes by name, numbers, and strings in sorted order; missing ones are -1."""

    def source(features=None, **columns):
        features = {"image": datasets.Image(), **(features or {})}
        rows = {"image": [picture()] * 3, **columns}
        types = datasets.Features(features) if len(features) == len(rows) else None
        return DatasetImages(datasets.Dataset.from_dict(rows, types))

    named = source({"fine": datasets.ClassLabel(names=["b", "a"])}, fine=[1, 0, None])
    for column in ("label", "fine"):
        assert (named.labels(column).ids.tolist(), named.labels(column).names) == ([1, 0, -1], ["b", "a"])
    assert named.select([1, 0]).labels().ids.tolist() == [0, 1]
    numbers = source({"label": datasets.Value("int32")}, label=[4, 0, 2]).labels()
    assert (numbers.ids.tolist(), numbers.ids.dtype, numbers.names) == ([4, 0, 2], np.int64, None)
    words = source({"label": datasets.Value("string")}, label=["dog", "cat", None]).labels()
    assert (words.ids.tolist(), words.names) == ([1, 0, -1], ["cat", "dog"])
    assert source({}).labels() is None
    with pytest.raises(ValueError, match=r"label_column='lable' .*does not exist: .*\['fine'\]"):
        named.labels("lable")
    with pytest.raises(ValueError, match="'label' holds no classes"):
        source({"label": datasets.Value("float32")}, label=[0.5, 1, 2]).labels()
    two = {name: datasets.ClassLabel(names=["a", "b"]) for name in ("coarse", "fine")}
    with pytest.raises(ValueError, match=r"must be one of \['coarse', 'fine'\]"):
        source(two, coarse=[0, 1, 0], fine=[0, 1, 1]).labels()


def test_labels_of_folders(tmp_path):
    """The first folder below is the class; what is in none has none."""
    for name in ("b/x/1.png", "b/2.png", "a/3.png", "4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    labels = FolderImages([tmp_path]).labels()
    assert (labels.ids.tolist(), labels.names) == ([-1, 0, 1, 1], ["a", "b"])
    assert FolderImages([tmp_path / "a"]).labels() is None
    listed = FileImages([str(tmp_path / name) for name in ("b/2.png", "a/3.png")]).labels()
    assert (listed.ids.tolist(), listed.names) == ([1, 0], ["a", "b"])
    with pytest.raises(ValueError, match="label_column='kind' .*folders"):
        FolderImages([tmp_path]).labels("kind")


def test_labels_of_arrays(tmp_path):
    """The second array of an .npz file, where there is one."""
    images = np.zeros((3, 4, 4, 3), np.uint8)
    write_npz(tmp_path / "with.npz", images, 3, [2, 0, 1])
    write_npz(tmp_path / "without.npz", images, 3)
    np.savez(tmp_path / "odd.npz", images, np.zeros((3, 2)))
    np.save(tmp_path / "plain.npy", images)
    labels = ArrayImages(tmp_path / "with.npz").labels()
    assert (labels.ids.tolist(), labels.names) == ([2, 0, 1], None)
    assert ArrayImages(tmp_path / "without.npz").labels() is None
    assert ArrayImages(tmp_path / "plain.npy").labels() is None
    with pytest.raises(ValueError, match=r"arr_1 in .*odd.npz must be classes \(3,\)"):
        ArrayImages(tmp_path / "odd.npz").labels()
    with pytest.raises(ValueError, match="label_column='y' .*does not exist"):
        ArrayImages(tmp_path / "with.npz").labels("y")
