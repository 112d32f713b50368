"""From columns as they came to inputs of a model."""

import io
import json
import struct
import warnings
import wave
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hasten.core.construct import construct
from hasten.core.errors import ConfigError
from hasten.data.transforms import (
    DecodeImage,
    HuggingFaceTokens,
    LogMel,
    Rename,
    Reshape,
    Scale,
    Select,
    Stack,
    Standardize,
    Tokens,
)
from hasten.data.transforms.standardize import normalise, statistics

RNG = np.random.default_rng(0)
NUMBERS = RNG.normal(7, 3, size=(6, 4)).astype(np.float32)


def column(*values):
    """An object array (B,), whatever the values are."""
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def png(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def wav(samples, rate=8000, width=2, channels=1):
    """A file of integer samples, interleaved where there are several channels."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((channels, width, rate, 0, "NONE", ""))
        writer.writeframes(b"".join(int(sample).to_bytes(width, "little", signed=width > 1) for sample in samples))
    return file.getvalue()


PIXELS = RNG.integers(256, size=(5, 7, 3), dtype=np.uint8)
TONE = np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000)

EXAMPLES = [
    (DecodeImage(column="x"), {"x": column(png(PIXELS), png(PIXELS[:, ::-1]))}),
    (Standardize(), {"x": NUMBERS, "ids": np.arange(6), "text": column(*"abcdef")}),
    (Tokens(column="x", length=4), {"x": column("the cat", "the dog.")}),
    (LogMel(column="x", seconds=0.1), {"x": column(wav(1000 * TONE))}),
    (Select(columns=("y", "x")), {"x": NUMBERS, "y": NUMBERS, "z": NUMBERS}),
    (Rename(names={"x": "a"}), {"x": NUMBERS, "y": NUMBERS}),
    (Stack(columns=("x", "y")), {"x": NUMBERS, "y": NUMBERS[:, 0]}),
    (Reshape(column="x", shape=(2, -1)), {"x": NUMBERS}),
    (Scale(column="x", factor=0.5, offset=1.0), {"x": NUMBERS}),
]


@pytest.mark.parametrize(("transform", "columns"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_a_fitted_transform_is_its_own_config(transform, columns):
    fitted = transform.fit(columns)
    target = f"{type(fitted).__module__}.{type(fitted).__qualname__}"
    node = json.loads(json.dumps({"_target_": target, **asdict(fitted)}))
    rebuilt = construct(node, "data.transforms[0]")
    assert rebuilt == fitted
    assert rebuilt.fit({}) == fitted
    again, once = rebuilt(columns), fitted(columns)
    assert list(again) == list(once)
    for name in once:
        np.testing.assert_array_equal(again[name], once[name])


@pytest.mark.parametrize(("transform", "columns"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_a_transform_leaves_its_columns_alone(transform, columns):
    before = {name: values.copy() for name, values in columns.items()}
    transform.fit(columns)(columns)
    assert list(columns) == list(before)
    for name, values in before.items():
        np.testing.assert_array_equal(columns[name], values)


@pytest.mark.parametrize(("transform", "columns"), EXAMPLES[2:], ids=lambda value: type(value).__name__)
def test_a_column_that_is_not_there_is_named(transform, columns):
    with pytest.raises(ConfigError, match=r"wants the column \w, but there is only other \(data\.transforms\)$"):
        transform.fit(columns)({"other": NUMBERS})


@pytest.mark.parametrize("transform", [Stack(columns=("x",)), Reshape(column="x", shape=(4,)), Scale(column="x")])
def test_numbers_are_not_made_of_texts(transform):
    with pytest.raises(ConfigError, match=r"wants numbers in the column x, got values of type str$"):
        transform({"x": column("1", "2")})


# --- columns


def test_select_keeps_these_columns_in_this_order():
    assert list(Select(columns=("y", "x"))({"x": NUMBERS, "y": NUMBERS, "z": NUMBERS})) == ["y", "x"]


def test_rename_keeps_the_order_and_swaps_names():
    renamed = Rename(names={"x": "y", "y": "x"})({"x": NUMBERS, "y": 2 * NUMBERS})
    assert list(renamed) == ["y", "x"]
    np.testing.assert_array_equal(renamed["y"], NUMBERS)


def test_rename_refuses_one_name_for_two_columns():
    with pytest.raises(ConfigError, match=r"two columns the name y \(data\.transforms\)"):
        Rename(names={"x": "y"})({"x": NUMBERS, "y": NUMBERS})


def test_stack_puts_the_features_side_by_side_in_the_place_of_the_first():
    columns = {"a": NUMBERS, "n": np.arange(6), "m": NUMBERS[:, :2].astype(np.float64), "flag": np.arange(6) > 2}
    stacked = Stack(columns=("flag", "m", "n"), name="features")(columns)
    assert list(stacked) == ["a", "features"]
    assert stacked["features"].dtype == np.float32
    expected = np.column_stack([np.arange(6) > 2, NUMBERS[:, :2], np.arange(6)])
    np.testing.assert_array_equal(stacked["features"], expected)


def test_stack_says_where_a_number_is_missing():
    with pytest.raises(ConfigError, match=r"column age, got NaN.* in 1 of 3 rows, the first in row 1$"):
        Stack(columns=("age",))({"age": np.array([1.0, np.nan, 3.0])})


def test_stack_refuses_images():
    with pytest.raises(ConfigError, match=r"got x of shape \(2, 3, 4\)"):
        Stack(columns=("x",))({"x": np.zeros((2, 3, 4))})


def test_a_new_column_takes_no_name_that_is_there():
    with pytest.raises(ConfigError, match=r"Stack makes the column y, which is there already"):
        Stack(columns=("x",), name="y")({"x": NUMBERS, "y": NUMBERS})


def test_reshape_keeps_the_values_in_order():
    reshaped = Reshape(column="x", shape=(1, 2, -1))({"x": NUMBERS})["x"]
    np.testing.assert_array_equal(reshaped, NUMBERS.reshape(6, 1, 2, 2))


@pytest.mark.parametrize("shape", [(3,), (3, -1), (2, 2, 2)])
def test_reshape_refuses_a_shape_of_another_size(shape):
    with pytest.raises(ConfigError, match=r"rows of x the shape \[.*they have the shape \[4\]"):
        Reshape(column="x", shape=shape)({"x": NUMBERS})


@pytest.mark.parametrize("shape", [(-1, -1), (0, 2), (-2,)])
def test_reshape_refuses_sizes_that_make_no_sense(shape):
    with pytest.raises(ConfigError, match=r"\(Reshape\.shape\)$"):
        Reshape(column="x", shape=shape)


def test_scale_is_a_line():
    scaled = Scale(column="x", factor=1 / 255, offset=-0.5)({"x": np.array([[0, 255]], dtype=np.uint8)})["x"]
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [[-0.5, 0.5]])


# --- Standardize


def test_statistics_are_per_channel_of_images_and_per_feature_of_rows():
    images = np.array([[[[1, 3]], [[10, 10]]], [[[5, 7]], [[30, 30]]]])
    mean, std = statistics(images)
    np.testing.assert_allclose(mean, [4, 20])
    np.testing.assert_allclose(std, [np.sqrt(5), 10])
    mean, std = statistics(np.array([[1.0, 10], [3, 30]]))
    np.testing.assert_allclose(mean, [2, 20])
    np.testing.assert_allclose(std, [1, 10])


def test_a_constant_feature_is_centred_and_not_blown_up():
    inputs = np.array([[0.1, 1e-9], [0.1, 3e-9], [0.1, 5e-9]], dtype=np.float32)
    normal = normalise(inputs, *statistics(inputs))
    assert abs(normal[:, 0]).max() < 1e-6
    np.testing.assert_allclose(normal[:, 1].std(), 1, rtol=1e-5)


def test_normalised_training_rows_have_mean_zero_and_deviation_one():
    inputs = np.random.default_rng(0).normal(7, 3, size=(50, 2, 4, 5))
    normal = normalise(inputs, *statistics(inputs))
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(normal.std((0, 2, 3)), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_many_rows_are_normalised_as_few_are(dtype, monkeypatch):
    values = RNG.integers(256, size=(50, 3, 4)).astype(dtype)
    mean, std = statistics(values)
    monkeypatch.setattr("hasten.data.transforms.checks._CACHED", 7 * 12)
    expected = ((values - mean[None, :, None]) / std[None, :, None]).astype(np.float32)
    np.testing.assert_array_equal(normalise(values, mean, std), expected)


def test_what_is_counted_and_what_is_written_is_left_as_it_is():
    columns = {
        "image": RNG.integers(256, size=(6, 3, 2, 2), dtype=np.uint8),
        "price": RNG.normal(5, 2, size=6),
        "ids": np.arange(12).reshape(6, 2),
        "small": np.arange(6, dtype=np.int32),
        "text": column(*"abcdef"),
    }
    fitted = Standardize().fit(columns)
    assert fitted.columns == ("image", "price")
    after = fitted(columns)
    assert list(after) == list(columns)
    assert after["image"].dtype == after["price"].dtype == np.float32
    np.testing.assert_allclose(
        after["price"], (columns["price"] - columns["price"].mean()) / columns["price"].std(), 1e-5
    )
    for name in ("ids", "small", "text"):
        assert after[name] is columns[name]


def test_statistics_of_the_config_are_used_as_they_are():
    given_ones = Standardize(mean={"x": [1.0, 2.0]}, std={"x": [2.0, 4.0]})
    assert given_ones.fit({"x": NUMBERS}) == given_ones
    np.testing.assert_allclose(given_ones({"x": np.array([[3.0, 10.0]])})["x"], [[1, 2]])


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"mean": {"x": [0.0]}}, "give both or neither"),
        ({"mean": {"x": [0.0]}, "std": {"x": [1.0, 1.0]}}, "as many values of x"),
        ({"mean": {"x": [0.0]}, "std": {"x": [0.0]}}, r"std must be above 0, got 0\.0 \(Standardize\.std\.x\)"),
        ({"mean": {"x": [0.0]}, "std": {"x": [1.0]}, "columns": ("y",)}, "must name the same columns"),
        ({"mean": {"x": [0.0], "y": [0.0]}, "std": {"x": [1.0]}}, "must name the same columns"),
    ],
)
def test_refuses_statistics_that_make_no_sense(knobs, problem):
    with pytest.raises(ConfigError, match=problem):
        Standardize(**knobs)


def test_refuses_other_features_than_it_has_seen():
    fitted = Standardize().fit({"x": NUMBERS})
    with pytest.raises(ConfigError, match=r"wants 4 features .* of the column x, got 3 in \(6, 3\)"):
        fitted({"x": NUMBERS[:, :3]})


def test_refuses_to_learn_from_what_is_not_finite():
    with pytest.raises(ConfigError, match="finite numbers in the column x"):
        Standardize().fit({"x": np.array([[1.0], [np.inf]])})


# --- DecodeImage


def test_pixels_of_a_lossless_file_come_channels_first():
    decoded = DecodeImage(column="x", size=(5, 7))({"before": NUMBERS[:1], "x": column(png(PIXELS)), "z": NUMBERS[:1]})
    assert list(decoded) == ["before", "x", "z"]
    assert decoded["x"].dtype == np.uint8
    np.testing.assert_array_equal(decoded["x"], PIXELS.transpose(2, 0, 1)[None])


def test_learns_the_commonest_size_and_of_equally_common_ones_the_smallest():
    small, large = png(PIXELS[:4, :6]), png(PIXELS)
    assert DecodeImage(column="x").fit({"x": column(small, large, large)}).size == (5, 7)
    assert DecodeImage(column="x").fit({"x": column(large, small)}).size == (4, 6)
    assert DecodeImage(column="x", size=(1, 1)).fit({"x": column(large)}).size == (1, 1)


def test_odd_sizes_are_stretched():
    decode = DecodeImage(column="x", size=(4, 6), resize="nearest")
    tall, whole = PIXELS[:2, :3], np.full((9, 5, 3), 77, dtype=np.uint8)
    decoded = decode({"x": column(png(tall), png(whole))})["x"]
    np.testing.assert_array_equal(decoded[0].transpose(1, 2, 0), np.kron(tall, np.ones((2, 2, 1), dtype=np.uint8)))
    for resize in ("nearest", "bilinear", "bicubic"):
        np.testing.assert_array_equal(replace(decode, resize=resize)({"x": column(png(whole))})["x"], 77)


def test_a_smaller_size_averages_over_the_pixels_that_it_covers():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 200
    decoded = DecodeImage(column="x", size=(8, 8), mode="L")({"x": column(png(stripes))})["x"]
    np.testing.assert_allclose(decoded[0, 0, 1:-1, 1:-1], 100, atol=2)


def test_grey_weighs_the_colours_as_the_eye_does():
    pixel = np.array([[[100, 150, 200]]], dtype=np.uint8)
    decoded = DecodeImage(column="x", size=(1, 1), mode="L")({"x": column(png(pixel))})["x"]
    assert decoded.tolist() == [[[[round(0.299 * 100 + 0.587 * 150 + 0.114 * 200)]]]]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4), (8, 9, 3)])
def test_arrays_give_the_same_pixels_as_their_files(mode, shape):
    pixels = RNG.integers(256, size=shape, dtype=np.uint8)
    decode = DecodeImage(column="x", size=(5, 7), mode=mode)
    files = decode({"x": column(png(pixels[..., 0] if shape[-1] == 1 else pixels))})["x"]
    np.testing.assert_array_equal(decode({"x": pixels[None]})["x"], files)
    np.testing.assert_array_equal(decode({"x": column(pixels)})["x"], files)


def test_reads_palettes_with_transparent_colours_and_the_first_picture_of_several():
    palette, file = Image.fromarray(PIXELS).convert("P"), io.BytesIO()
    palette.save(file, "PNG", transparency=bytes([0, 128, 255]))
    later, gif = Image.new("L", (7, 5), 255), io.BytesIO()
    Image.new("L", (7, 5), 3).save(gif, "GIF", save_all=True, append_images=[later])
    decoded = DecodeImage(column="x", size=(5, 7))({"x": column(file.getvalue(), gif.getvalue())})["x"]
    np.testing.assert_array_equal(decoded[0].transpose(1, 2, 0), np.asarray(palette.convert("RGB")))
    assert (decoded[1] == 3).all()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"", "got 0 bytes that are no image"),
        (b"not an image", "got 12 bytes that are no image"),
        (png(PIXELS)[:60], "got a broken image: "),
        (png(PIXELS.astype(np.uint16)[..., 0]), r"got pixels of more than 8 bits \(mode I;16\)"),
        ("cat.png", "got a str instead of bytes"),
        (None, "got a NoneType instead of bytes"),
        (PIXELS.astype(np.float32), r"got float32 of shape \(5, 7, 3\) instead of uint8"),
        (PIXELS[..., :2], r"got uint8 of shape \(5, 7, 2\) instead of uint8"),
    ],
)
def test_a_broken_image_is_named_by_column_and_row(value, problem):
    with pytest.raises(ConfigError, match=rf"in the column picture, row 1, {problem}"):
        DecodeImage(column="picture", size=(5, 7))({"picture": column(png(PIXELS), value)})


@pytest.mark.parametrize(
    "values", [np.array([b"abc"]), np.array(["abc"]), NUMBERS, np.zeros((2, 3, 8, 8), dtype=np.float32)]
)
def test_refuses_a_column_without_images(values):
    with pytest.raises(ConfigError, match=r"wants bytes of image files or uint8 arrays .* in the column x, got "):
        DecodeImage(column="x", size=(5, 7))({"x": values})


@settings(max_examples=150)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]), data=st.data(), mode=st.sampled_from(["RGB", "L"]))
def test_bytes_from_anywhere_are_decoded_or_refused(kind, data, mode):
    content = bytearray(png(PIXELS, kind))
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=8)):
        content[place] = value
    images = {"x": column(bytes(content[: data.draw(st.integers(1, len(content)))]))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fitted = DecodeImage(column="x", mode=mode).fit(images)
            if max(fitted.size) < 1000:
                assert fitted(images)["x"].shape == (1, 3 if mode == "RGB" else 1, *fitted.size)
        except ConfigError:
            pass


# --- Tokens

TEXTS = {"text": column("The cat sat.", "the dog", "A cat!")}


def test_words_are_numbered_by_how_common_they_are_and_then_by_the_alphabet():
    fitted = Tokens(column="text", length=5).fit(TEXTS)
    assert fitted.vocabulary == ("cat", "the", "!", ".", "a", "dog", "sat")
    assert fitted.facts() == {"vocabulary_size": 9}
    made = fitted(TEXTS)
    assert list(made) == ["ids", "mask"]
    assert made["ids"].tolist() == [[3, 2, 8, 5, 0], [3, 7, 0, 0, 0], [6, 2, 4, 0, 0]]
    assert made["mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert made["ids"].dtype == made["mask"].dtype == np.int64


def test_strange_words_are_unknown_and_long_texts_are_cut():
    fitted = Tokens(column="text", length=2).fit(TEXTS)
    made = fitted({"text": column("a zebra sat", "dog")})
    assert made["ids"].tolist() == [[6, 1], [7, 0]]


@pytest.mark.parametrize("text", ["", "   \n"])
def test_an_empty_text_is_one_unknown_word(text):
    made = Tokens(column="text", length=3).fit(TEXTS)({"text": column(text)})
    assert (made["ids"].tolist(), made["mask"].tolist()) == ([[1, 0, 0]], [[1, 0, 0]])


def test_only_the_commonest_words_fit_into_a_small_vocabulary():
    fitted = Tokens(column="text", vocabulary_size=4, length=3).fit(TEXTS)
    assert fitted.vocabulary == ("cat", "the")
    assert fitted(TEXTS)["ids"].max() < fitted.facts()["vocabulary_size"] == 4


def test_case_counts_where_it_is_wanted_and_words_are_what_the_pattern_says():
    as_written = Tokens(column="text", lowercase=False).fit(TEXTS)
    assert as_written.vocabulary == ("cat", "!", ".", "A", "The", "dog", "sat", "the")
    letters = Tokens(column="text", pattern="[a-z]").fit({"text": column("aab")})
    assert letters.vocabulary == ("a", "b")


@settings(max_examples=50)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(1, 6))
def test_every_mask_marks_the_words_and_at_least_one(texts, length):
    columns = {"text": column(*texts)}
    fitted = Tokens(column="text", length=length, vocabulary_size=5).fit(columns)
    made = fitted(columns)
    assert made["ids"].shape == made["mask"].shape == (len(texts), length)
    assert (made["mask"].sum(axis=1) >= 1).all()
    np.testing.assert_array_equal(made["mask"], made["ids"] > 0)
    assert (np.diff(made["mask"], axis=1) <= 0).all()
    assert made["ids"].max() < fitted.facts()["vocabulary_size"]


def test_says_which_axis_may_be_shorter():
    assert Tokens(column="text").dynamic() == {"ids": (0,), "mask": (0,)}
    assert Tokens(column="text", dynamic_length=False).dynamic() == {}
    assert Tokens(column="text").facts() == {}


def test_two_texts_get_columns_of_their_own():
    columns = {"one": TEXTS["text"], "two": TEXTS["text"][::-1]}
    first = Tokens(column="one", ids="one_ids", mask="one_mask").fit(columns)
    made = Tokens(column="two").fit(columns)(first(columns))
    assert list(made) == ["one_ids", "one_mask", "ids", "mask"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (column("a", None), "wants texts in the column text, got NoneType in row 1"),
        (column(b"a"), "got bytes in row 0"),
        (NUMBERS, r"wants one text a row in the column text, got float32 of shape \(6, 4\)"),
    ],
)
def test_refuses_what_is_no_text(values, problem):
    with pytest.raises(ConfigError, match=problem):
        Tokens(column="text").fit(TEXTS)({"text": values})


def test_refuses_a_pattern_that_is_none():
    with pytest.raises(ConfigError, match=r"pattern must be a regular expression, got '\('.*\(Tokens\.pattern\)$"):
        Tokens(column="text", pattern="(")


# --- HuggingFaceTokens


def saved_tokenizer(folder, special=True):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "the", "cat", "sat"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_tokenizes_as_the_saved_file_says_and_carries_it_along(tmp_path):
    folder = saved_tokenizer(tmp_path)
    columns = {"text": column("the cat", "the cat sat the cat", "dog")}
    fitted = HuggingFaceTokens(column="text", length=5, folder=folder, token_type_ids=True).fit(columns)
    (tmp_path / "tokenizer.json").unlink()
    rebuilt = HuggingFaceTokens(**json.loads(json.dumps(asdict(fitted))))
    made = rebuilt(columns)
    assert list(made) == ["input_ids", "attention_mask", "token_type_ids"]
    assert made["input_ids"].tolist() == [[2, 4, 5, 3, 1], [2, 4, 5, 6, 3], [2, 0, 3, 1, 1]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 1, 0, 0]]
    assert {values.dtype for values in made.values()} == {np.dtype(np.int64)}
    assert rebuilt.facts() == {"vocabulary_size": 7}
    assert rebuilt.dynamic() == dict.fromkeys(made, (0,))
    assert fitted.folder is None


def test_a_text_without_tokens_keeps_one_position(tmp_path):
    folder = saved_tokenizer(tmp_path, special=False)
    columns = {"text": column("", "cat")}
    made = HuggingFaceTokens(column="text", length=3, folder=folder).fit(columns)(columns)
    assert made["input_ids"].tolist() == [[1, 1, 1], [5, 1, 1]]
    assert made["attention_mask"].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_refuses_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"^HuggingFaceTokens\.folder=.* has no readable tokenizer\.json"):
        HuggingFaceTokens(column="text", length=3, folder=str(tmp_path)).fit(TEXTS)
    with pytest.raises(ConfigError, match=r"folder must name a folder .*, got null"):
        HuggingFaceTokens(column="text", length=3)


def test_refuses_a_broken_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"can't use its tokenizer\.json with length=3"):
        HuggingFaceTokens(column="text", length=3, folder=str(tmp_path)).fit(TEXTS)(TEXTS)


def test_says_how_to_get_the_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"^tokenizers is not installed: pip install 'hasten\[transformers\]'$"):
        HuggingFaceTokens(column="text", length=3, tokenizer="{}")(TEXTS)


# --- LogMel


def test_spectrogram_is_that_of_an_independent_transform():
    import torch

    sound = RNG.normal(scale=0.1, size=(3, 8000))
    mel = LogMel(column="x")
    made = mel({"x": sound})["x"]
    assert (made.shape, made.dtype) == ((3, 1, 40, 98), np.float32)
    window = torch.hann_window(200, periodic=True, dtype=torch.float64)
    # torch.stft puts a short window into the middle of the transform: take the 200 samples before instead.
    frames = torch.from_numpy(sound).unfold(1, 200, 80) * window
    power = torch.fft.rfft(frames, 256).abs().square()
    hertz = np.arange(129) * 8000 / 256
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 42) / 2595) - 1)
    bank = np.stack([np.interp(hertz, corners[i : i + 3], [0, 1, 0]) for i in range(40)], axis=1)
    expected = np.log(np.maximum(power.numpy() @ bank, 1e-5)).transpose(0, 2, 1)
    np.testing.assert_allclose(made[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_power_is_that_of_the_short_time_fourier_transform():
    import torch

    # One band a frequency would be another program: the sum over bands that overlap to 1 is the power in between.
    mel = LogMel(column="x", frame_ms=32, hop_ms=8, mels=20)
    sound = RNG.normal(scale=0.1, size=(2, 8000))
    made = np.exp(mel({"x": sound})["x"][:, 0])
    window = torch.hann_window(256, dtype=torch.float64)
    spectrum = torch.stft(torch.from_numpy(sound), 256, 64, window=window, center=False, return_complex=True)
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 22) / 2595) - 1)
    covered = np.interp(np.arange(129) * 31.25, [0, corners[1], corners[-2], corners[-1]], [0, 1, 1, 0])
    expected = (spectrum.abs().square().numpy() * covered[:, None]).sum(axis=1)
    np.testing.assert_allclose(made.sum(axis=1), expected, rtol=1e-4)


@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_a_tone_is_loudest_in_its_band(hertz):
    made = LogMel(column="x")({"x": np.sin(2 * np.pi * hertz * np.arange(8000) / 8000)[None]})["x"]
    centre = 2595 * np.log10(1 + hertz / 700) / (2595 * np.log10(1 + 4000 / 700)) * 41 - 1
    assert (abs(made[0, 0].argmax(axis=0) - centre) <= 1).all()


@pytest.mark.parametrize(("width", "tolerance"), [(1, 0.1), (2, 1e-3), (3, 1e-4), (4, 1e-4)])
def test_files_of_every_width_hold_the_same_sound(width, tolerance):
    scale = 2 ** (8 * width - 1)
    samples = np.round(0.5 * TONE * scale) + (128 if width == 1 else 0)
    made = LogMel(column="x", floor=1.0)({"x": column(wav(samples, width=width))})["x"]
    np.testing.assert_allclose(made, LogMel(column="x", floor=1.0)({"x": 0.5 * TONE[None]})["x"], atol=tolerance)


def test_channels_are_averaged():
    stereo = np.stack([10000 * TONE, np.zeros(8000)], axis=1).round().reshape(-1)
    made = LogMel(column="x")({"x": column(wav(stereo, channels=2), wav(5000 * TONE))})["x"]
    np.testing.assert_allclose(made[0, 0, :, 0].max(), made[1, 0, :, 0].max(), atol=1e-3)


def test_another_sample_rate_is_resampled():
    slow = 0.5 * TONE
    fast = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(22050) / 22050)
    mel = LogMel(column="x", floor=1.0)
    made = mel({"x": column(wav(slow * 32768), wav(fast * 32768, rate=22050))})["x"]
    np.testing.assert_allclose(made[1, 0, :, 5:-5], made[0, 0, :, 5:-5], atol=0.01)


def test_a_long_recording_is_resampled_as_its_beginning():
    long = np.round(3000 * np.sin(np.arange(5 * 11025) ** 1.2 / 50))
    made = LogMel(column="x")({"x": column(wav(long, rate=11025), wav(long[: 2 * 11025], rate=11025))})["x"]
    np.testing.assert_allclose(made[0], made[1], atol=1e-6)


def test_sound_is_cut_and_padded_with_silence():
    mel = LogMel(column="x", seconds=0.5)
    made = mel({"x": column(wav(9000 * TONE), wav(9000 * TONE[:2000]), np.zeros(0))})["x"]
    assert made.shape == (3, 1, 40, 48)
    np.testing.assert_array_equal(made[0, ..., :20], made[1, ..., :20])
    np.testing.assert_allclose(made[1, ..., -20:], np.log(1e-5))
    np.testing.assert_allclose(made[2], np.log(1e-5))


def test_many_sounds_are_made_as_few_are():
    sounds = RNG.normal(scale=0.1, size=(300, 400))
    mel = LogMel(column="x", seconds=0.05)
    np.testing.assert_array_equal(mel({"x": sounds})["x"][-3:], mel({"x": sounds[-3:]})["x"])


FLOATING = b"RIFF" + struct.pack("<I", 40) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, 8000, 32000, 4, 32)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"", "bytes that are no WAV file of PCM samples: they end early"),
        (b"not sound at all, in truth", "bytes that are no WAV file of PCM samples"),
        (FLOATING + b"data" + struct.pack("<I", 0), "no WAV file of PCM samples: unknown format: 3"),
        ("a.wav", "str instead of bytes"),
        (wav([0], rate=4_000_000), "a WAV file of 16 bits at 4000000 Hz"),
        (np.zeros(3, dtype=np.int16), r"int16 of shape \(3,\) instead of bytes of a WAV file or a float array"),
        (np.array([0.0, np.nan]), "samples that are NaN or infinite"),
    ],
)
def test_broken_sound_is_named_by_column_and_row(value, problem):
    with pytest.raises(ConfigError, match=rf"in the column sound, row 1, got .*{problem}"):
        LogMel(column="sound")({"sound": column(wav([0]), value)})


@settings(max_examples=100)
@given(st.data())
def test_sound_from_anywhere_is_read_or_refused(data):
    content = bytearray(wav(range(100)))
    places = st.tuples(st.integers(0, 50), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[place] = value
    try:
        made = LogMel(column="x")({"x": column(bytes(content[: data.draw(st.integers(1, len(content)))]))})
        assert np.isfinite(made["x"]).all()
    except ConfigError:
        pass


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"frame_ms": 0.1}, "frame_ms must be at least 2 samples"),
        ({"hop_ms": 0.01}, "hop_ms at least 1 sample"),
        ({"seconds": 0.01}, "at most seconds"),
        ({"mels": 200}, r"mels must leave each band a frequency of the spectrum, got 200.*lower LogMel\.mels"),
    ],
)
def test_refuses_frames_and_bands_that_make_no_sense(knobs, problem):
    with pytest.raises(ConfigError, match=problem):
        LogMel(column="x", **knobs)
