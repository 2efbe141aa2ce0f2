"""The numbered images of a folder, against a plain reading of their names."""

import re

from hypothesis import assume, given
from hypothesis import strategies as st

from posmlp.video.image_series import choose_series, find_series

BEFORE = st.text("abz_-{}. ", max_size=8).filter(lambda text: not text.startswith("."))
AFTER = st.sampled_from((".jpg", ".JPG", ".png", "_crop.bmp", " {x}.webp"))


@given(BEFORE, AFTER, st.integers(0, 7), st.sets(st.integers(0, 20_000_000), min_size=1, max_size=30))
def test_any_prefix_padding_and_numbers_are_found(before, after, digits, numbers):
    names = {f"{before}{number:0{digits or 1}d}{after}": number for number in numbers}
    (series,) = find_series([*names, "notes.txt", ".img7.jpg", "Thumbs.db", "cover.jpg"])
    assert series.numbers == tuple(sorted(numbers))
    assert series.strays == ()
    assert {series.name(number) for number in numbers} == set(names)
    assert {series.template.format(number) for number in numbers} == set(names)
    assert choose_series([series], "{:05d}.jpg") is series


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(0, 60), st.integers(0, 20))
def test_the_first_missing_number_is_named(numbers, first, length):
    (series,) = find_series(f"img{number}.jpg" for number in numbers)
    wanted = range(first, first + length + 1)
    assert series.missing(first, first + length) == min((n for n in wanted if n not in numbers), default=None)


@given(st.lists(st.tuples(BEFORE, st.integers(1, 9)), min_size=2, max_size=4, unique_by=lambda each: each[0]))
def test_of_several_series_the_template_names_one(several):
    names = [f"{before}{number}.jpg" for before, count in several for number in range(1, count + 1)]
    found = find_series(names)
    assert {each.before: len(each.numbers) for each in found} == dict(several)
    for before, _ in several:
        template = before.replace("{", "{{").replace("}", "}}") + "{:03d}.jpg"
        chosen = choose_series(found, template)
        assert chosen.before == before
    problem = choose_series(found, "other{}.jpg")
    assert problem.startswith(f"{len(several)} series of images")
    for each in found:
        assert f"{each.template} ({len(each.numbers)})" in problem


@given(st.integers(0, 999), st.integers(2, 5))
def test_a_number_that_is_padded_otherwise_is_a_stray(number, digits):
    padded, plain = f"{number:0{digits}d}", str(number)
    assume(padded != plain)
    (series,) = find_series([f"img{padded}.jpg", f"img{plain}.jpg"])
    assert (series.numbers, series.strays) == ((number,), (f"img{plain}.jpg",))


def test_names_of_the_published_sets():
    for name, number, template in (
        ("img46.jpg", 46, "img{}.jpg"),
        ("reg_img46.jpg", 46, "reg_img{}.jpg"),
        ("006_05562.jpg", 5562, "006_{:05d}.jpg"),
        ("image17581039.jpg", 17581039, "image{}.jpg"),
        ("reg_image090823.bmp", 90823, "reg_image{:06d}.bmp"),
        ("00001.jpg", 1, "{:05d}.jpg"),
    ):
        (series,) = find_series([name])
        assert (series.numbers, series.template) == ((number,), template)


@given(st.integers(0, 10**40))
def test_a_number_of_any_length_is_read(number):
    (series,) = find_series([f"{number}.jpg"])
    assert series.name(series.numbers[0]) == f"{number}.jpg"


def test_images_without_numbers_are_no_series():
    assert find_series(["a.jpg", "b.png", "1.txt", "2"]) == []
    assert re.match("no numbered images", choose_series([], "{:05d}.jpg"))
