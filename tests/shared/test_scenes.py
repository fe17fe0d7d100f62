"""Scenes: pure functions of (seed, index), never-trained combinations by hash, and ground truth that can be counted."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shared.errors import UserError
from shared.media.scene_scores import border_ratio, rights, squared_error, summary, truth_pictures
from shared.media.scenes import GROUNDS, MOTIONS, PLACES, RELATIONS, SIZES, Drawing, Scenes, cut_out, noun_of


def shape(number: int) -> Image.Image:
    """A drawing on white: a disc, with a bar at a place and of a colour of its own, and a white hole."""
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 8, 56, 56), fill=(40 * (number % 6), 200 - 30 * (number % 5), 50 + 25 * (number % 8)))
    pen.rectangle((12 + 3 * number, 14, 18 + 3 * number, 50), fill=(255 - 20 * number, 20 * number, 128))
    pen.ellipse((28, 28, 36, 36), fill="white")
    return image


def world(count: int = 8, **options) -> Scenes:
    return Scenes([Drawing(f"thing {number}", cut_out(shape(number))) for number in range(count)], **options)


def test_a_scene_follows_from_seed_and_index_alone():
    one, other = world(kinds=("one", "two", "moving")), world(kinds=("one", "two", "moving"))
    backwards = [other.scene(index) for index in reversed(range(40))][::-1]
    assert [one.scene(index) for index in range(40)] == backwards
    assert [one.sentence(scene, 3) for scene in backwards] == [other.sentence(scene, 3) for scene in backwards]
    assert np.array_equal(one.picture(backwards[7]), other.picture(backwards[7]))
    assert [world(seed=1).scene(index) for index in range(9)] != [world(seed=0).scene(index) for index in range(9)]


@pytest.mark.parametrize("kind", ["one", "two", "moving"])
def test_combinations_that_are_kept_back_are_never_trained(kind):
    scenes = world(kinds=(kind,), unseen_share=0.2)

    def combination(scene):
        names = tuple(scenes.name(scene, which) for which in range(len(scene.objects)))
        return scenes._combination(scene) if kind == "two" else (*names, scene.ground, scene.place or scene.motion)

    trained = {combination(scenes.scene(index)) for index in range(3000)}
    kept = {combination(scenes.scene(index, unseen=True)) for index in range(3000)}
    assert not trained & kept
    assert 0.1 < len(kept) / len(trained | kept) < 0.3


def test_what_is_kept_back_is_a_matter_of_words_not_of_order():
    scenes = world(unseen_share=0.3)
    shuffled = Scenes(scenes.drawings[::-1], unseen_share=0.3)
    for index in range(50):
        scene = scenes.scene(index, unseen=index % 2 == 0)
        assert shuffled.is_unseen(scene._replace(objects=(7 - scene.objects[0],))) == (index % 2 == 0)


def test_a_left_of_b_is_b_right_of_a():
    scenes = world(kinds=("two",), unseen_share=0.3)
    for index in range(60):
        scene = scenes.scene(index, unseen=index % 2 == 0)
        turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
        other = scene._replace(objects=scene.objects[::-1], relation=turned, shifts=scene.shifts[::-1])
        assert scenes.is_unseen(other) == scenes.is_unseen(scene)
        assert np.array_equal(scenes.picture(other), scenes.picture(scene))


def test_every_value_is_drawn_about_equally_often():
    scenes = world(kinds=("one", "two", "moving"))
    drawn = [scenes.scene(index) for index in range(3000)]
    for field, values in (("ground", GROUNDS), ("size", SIZES), ("place", PLACES), ("relation", RELATIONS)):
        counts = Counter(getattr(scene, field) for scene in drawn if getattr(scene, field))
        assert set(counts) == set(values) and max(counts.values()) < 1.6 * min(counts.values()), field
    assert {scene.motion for scene in drawn} == {"", *MOTIONS}


def test_objects_lie_where_the_words_say():
    scenes = world(height=48, width=64, unseen_share=0.0)
    base = scenes.scene(0)._replace(size="small", shifts=((0.0, 0.0), (0.0, 0.0)))
    for place in PLACES:
        rows, columns = np.nonzero(scenes.mask(base._replace(place=place)) > 0.5)
        assert (rows.mean() < 24) == place.startswith("top") and (columns.mean() < 32) == place.endswith("left")
    areas = [scenes.mask(base._replace(size=size)).sum() for size in ("small", "large")]
    assert 1.8 < areas[1] / areas[0] < 2.7  # (0.75 / 0.5) squared
    paths = {"to the right": (1, 1), "to the left": (1, -1), "down": (0, 1), "up": (0, -1)}
    for motion, (axis, sign) in paths.items():
        moving = base._replace(place="", motion=motion)
        centres = [np.argwhere(scenes.mask(moving, at) > 0.5).mean(0)[axis] for at in (0.0, 0.5, 1.0)]
        assert sign * (centres[1] - centres[0]) > 5 and sign * (centres[2] - centres[1]) > 5
        assert scenes.frames(moving, 5).shape == (5, 48, 64, 3)


def test_the_ground_has_its_colour_and_objects_keep_theirs():
    scenes = world(unseen_share=0.0)
    scene = scenes.scene(1)
    outside = scenes.picture(scene)[scenes.mask(scene) == 0]
    assert (outside == GROUNDS[scene.ground]).all()
    other = scenes.picture(scene._replace(ground="black"))
    inside = scenes.mask(scene) > 0.999
    assert inside.sum() > 40 and np.array_equal(other[inside], scenes.picture(scene)[inside])


def test_white_inside_a_drawing_stays_and_white_around_it_goes():
    rgba = cut_out(shape(0))
    assert 46 <= len(rgba) <= 50 and rgba.shape[0] == rgba.shape[1]
    centre = len(rgba) // 2
    assert rgba[centre, centre].tolist() == [255, 255, 255, 255] and rgba[0, 0, 3] == 0
    transparent = Image.new("RGBA", (20, 40), (255, 255, 255, 0))
    transparent.paste((200, 0, 0, 255), (5, 10, 15, 30))
    assert cut_out(transparent).shape == (20, 20, 4) and cut_out(transparent)[10, 10].tolist() == [200, 0, 0, 255]
    with pytest.raises(ValueError, match="nothing but ground"):
        cut_out(Image.new("RGB", (16, 16), "white"))


def test_sentences_tell_everything_in_many_words():
    scenes = world(kinds=("one",))
    scene = scenes.scene(0)._replace(ground="purple", size="small", place="top left")
    texts = {scenes.sentence(scene, index) for index in range(300)}
    assert len(texts) > 60
    for text in texts:
        assert "thing" in text and "left" in text and ("top" in text or "upper" in text)
        assert "purple" in text or "violet" in text
        assert any(word in text for word in ("small", "little", "tiny"))
    assert "a subject" in scenes.sentence(scene._replace(size="large"), 5, nouns=["subject"]).replace(
        "big ", ""
    ).replace("large ", "").replace("huge ", "")
    pair = world(kinds=("two",)).scene(4)
    assert "thing" in world(kinds=("two",)).sentence(pair, 0)


def test_questions_have_right_answers_and_edits_change_one_thing():
    scenes = world(kinds=("one", "two", "moving"))
    for index in range(200):
        scene = scenes.scene(index)
        asked, answer = scenes.question(scene, index)
        assert asked.endswith("?") and answer
        if "colour" in asked:
            assert answer == scene.ground
        told, after = scenes.edit(scene, index)
        changed = [field for field in scene._fields if getattr(scene, field) != getattr(after, field)]
        assert len(changed) == 1 and getattr(after, changed[0]) in told


def test_scores_are_perfect_for_the_truth_and_chance_for_noise():
    scenes = world(count=24, kinds=("one", "two"))
    truths = [scenes.scene(index, unseen=True) for index in range(48)]
    found = summary(scenes, truths, truth_pictures(scenes, truths), patch=4)
    names = {f"{name}_right" for name in ("object", "second", "ground", "place", "size", "relation")}
    assert {found[name] for name in names} == {1.0}
    assert found["squared_error"] == 0.0 and found["border_ratio"] == found["border_ratio_true"]
    noise = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3)).astype(np.uint8)
    worse = summary(scenes, truths, noise, patch=4)
    assert worse["object_right"] < 0.3 and worse["ground_right"] < 0.4 and worse["squared_error"] > 0.4


@pytest.mark.parametrize(
    ("what", "unharmed"),
    [
        ("object", {"ground", "place", "size"}),
        ("ground", {"object", "place", "size"}),
        ("place", {"ground"}),  # an object elsewhere overlaps little with any candidate
        ("size", {"ground", "place"}),
    ],
)
def test_one_wrong_thing_is_counted_as_that_thing(what, unharmed):
    scenes = world(count=16)
    truths = [scenes.scene(index) for index in range(24)]
    wrong = truth_pictures(scenes, [scenes.alternatives(truth, what)[1] for truth in truths])
    found = rights(scenes, truths, wrong)
    assert found[what].mean() == 0.0
    assert all(found[name].mean() > 0.7 for name in unharmed)


def test_clips_are_scored_by_their_motion():
    scenes = world(kinds=("moving",))
    truths = [scenes.scene(index) for index in range(8)]
    clips = truth_pictures(scenes, truths, frames=3)
    assert summary(scenes, truths, clips, patch=4)["motion_right"] == 1.0
    assert rights(scenes, truths, clips[:, ::-1])["motion"].mean() == 0.0


def test_seams_show_in_the_border_ratio():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.integers(-2, 3, (4, 32, 32, 3)), axis=1).clip(-50, 50).astype(np.int16) + 128
    smooth = np.cumsum(np.diff(smooth, axis=2, prepend=128) % 3 - 1, axis=2) + 128
    tiles = np.repeat(np.repeat(rng.integers(0, 256, (4, 8, 8, 3)), 4, axis=1), 4, axis=2).astype(np.uint8)
    assert 0.8 < border_ratio(smooth.clip(0, 255).astype(np.uint8), 4) < 1.2
    assert border_ratio(tiles, 4) > 100
    assert squared_error(np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)) == 4.0


def test_recoloured_scenes_recolour_object_and_reference_together():
    scenes = world(recoloured=1.0)
    scene = scenes.scene(0)
    assert scene.channels != (0, 1, 2) and scenes.scene(0, unseen=True).channels == (0, 1, 2)
    plain = scene._replace(channels=(0, 1, 2))
    moved = scenes.reference(plain, 24)[..., list(scene.channels)]
    assert np.array_equal(scenes.reference(scene, 24), moved)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match="at least 2 drawings"):
        world(count=1, kinds=("two",))
    with pytest.raises(UserError, match="two drawings are named 'twin'"):
        Scenes([Drawing("twin", cut_out(shape(0)))] * 2)
    with pytest.raises(UserError, match="unseen share 0.0"):
        world(unseen_share=0.0).scene(0, unseen=True)
    with pytest.raises(UserError, match="one, two, moving"):
        world(kinds=("three",))
    with pytest.raises(UserError, match="from 0 to below 1"):
        world(unseen_share=1.0)


def test_the_noun_of_a_caption():
    assert noun_of("A diya lamp.") == "diya lamp" and noun_of("an ant.") == "ant" and noun_of("Keycap #") == "keycap #"
