"""The supernet of a search space: its choices, the members that are drawn, and the agreement of rankings."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.studies.study import StudyError, Trial, TrialState
from pipelines.tuning.supernet import (
    MemberScorer,
    StandaloneTrial,
    compare_rankings,
    draw_members,
    refuse_outsiders,
    supernet_recipe,
)
from posmlp.config import RecipeError, load_recipe
from posmlp.model.backbone import Block
from posmlp.video.augment import to_input
from tests.helpers.random_models import random_model
from tune_spaces import Space, load_space


def test_the_supernet_of_a_space_holds_all_its_members():
    recipe = load_recipe("demo")
    space = load_space("same_width", recipe)
    config = supernet_recipe(space, "same_width", recipe, "net")
    choices = config.model.variant().choices
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert choices.contains(space.recipe(recipe, space.random(rng)).model.variant().architecture())
    assert config.name == "net" and not config.tracking.log_model
    assert config.model.variant().depths == recipe.model.variant().depths  # its own where the space has it
    assert config.model.variant().groups == recipe.model.variant().groups
    coarse = load_space("same_width", recipe)
    coarse.dimensions["groups2"] = (1, 4)
    assert supernet_recipe(coarse, "coarse", recipe, "net").model.groups == (4, 4, 8, 16)  # 8 is no choice there


@pytest.mark.parametrize(
    "space, message",
    [
        ("speed_accuracy", r"has model\.dims \[8, 16, 24, 32\], not None; members of a supernet may differ in"),
        ("learning", "space learning has the range lr"),
        ("widths", r"space widths: width 0\.5 has model\.dims"),
    ],
)
def test_a_space_with_other_dimensions_is_refused(space, message):
    recipe = load_recipe("demo")
    with pytest.raises(StudyError, match=message):
        supernet_recipe(load_space(space, recipe), space, recipe, "net")


def test_members_that_the_supernet_does_not_hold_are_refused_before_it_is_trained():
    """Eight groups need two blocks, and the first value of the depth is one."""
    recipe = load_recipe("demo")

    def keys(member):
        if member["groups1"] == 8 and member["depth1"] == 1:
            raise RecipeError("8 groups need 2 blocks")
        own = recipe.model.variant()
        return {
            "model.groups": (member["groups1"], *own.groups[1:]),
            "model.depths": (member["depth1"], *own.depths[1:]),
        }

    space = Space({"groups1": (1, 8), "depth1": (1, 2)}, keys)
    config = supernet_recipe(space, "mine.py", recipe, "net")
    drawn = list(draw_members(space, recipe, 10, seed=0))
    assert len(drawn) == 3
    with pytest.raises(StudyError, match=r"space mine\.py: the supernet does not hold the member groups 8; depth 2"):
        refuse_outsiders("mine.py", config, drawn)
    turned = Space({"groups1": (1, 8), "depth1": (2, 1)}, keys)
    config = supernet_recipe(turned, "mine.py", recipe, "net")
    refuse_outsiders("mine.py", config, list(draw_members(turned, recipe, 10, seed=0)))


def test_members_are_drawn_once_each_and_all_of_a_small_space():
    recipe = load_recipe("demo")
    some = [member for member, _ in draw_members(load_space("same_width", recipe), recipe, 50, seed=0)]
    assert len({tuple(member.items()) for member in some}) == 50
    assert some == [member for member, _ in draw_members(load_space("same_width", recipe), recipe, 50, seed=0)]
    assert some != [member for member, _ in draw_members(load_space("same_width", recipe), recipe, 50, seed=1)]
    whole = [member for member, _ in draw_members(load_space("depths", recipe), recipe, 1000, seed=0)]
    assert len({tuple(member.items()) for member in whole}) == len(whole) == 108
    listed = replace(load_space("same_width", recipe), members=tuple(some[:20]))
    assert [member for member, _ in draw_members(listed, recipe, 20, seed=0)] == some[:20]
    few = [member for member, _ in draw_members(listed, recipe, 5, seed=0)]
    assert len({tuple(member.items()) for member in few}) == 5 and all(member in some[:20] for member in few)
    assert supernet_recipe(listed, "listed", recipe, "net") == supernet_recipe(
        load_space("same_width", recipe), "whole", recipe, "net"
    )


def test_rank_agreement_is_in_closed_form():
    """Spearman's coefficient in closed form: 1 - 6 sum(d^2) / (n (n^2 - 1)); one pair of six out of order."""
    alone = (0.1, 0.4, 0.2, 0.9)
    trained = [StandaloneTrial(Trial(i, {}, state=TrialState.FINISHED), top1, None) for i, top1 in enumerate(alone)]
    found = compare_rankings(trained, [0.3, 0.5, 0.6, 0.7])
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found.kendall == pytest.approx((5 - 1) / 6)
    assert "over 4 members" in str(found)
    assert np.isnan(compare_rankings(trained, [0.5] * 4).spearman)


def test_members_are_scored_with_the_supernets_weights():
    recipe = load_recipe("demo", ["model.num_classes=8", "model.frames=4", "model.image_size=32"])
    space = load_space("depths", recipe)
    config = supernet_recipe(space, "depths", recipe, "net")
    model = random_model(config)
    recipes = [member for _, member in draw_members(space, recipe, 3, 0)]
    scorer = MemberScorer(config.model_dump(), [each.model.variant().architecture() for each in recipes])
    scorer.load(model.state_dict())
    clips = torch.randint(256, (5, 4, 32, 32, 3), dtype=torch.uint8)
    found = scorer.score_batch(model, SimpleNamespace(clips=clips))
    for column, member in zip(found.T, scorer.architectures, strict=True):
        with torch.no_grad():
            expected = model.member(member).eval()(to_input(clips, config)).argmax(1)
        assert torch.equal(column, expected)
    kept = [block.frozen for member in scorer.members for block in member.modules() if isinstance(block, Block)]
    assert kept and not any(kept)  # merged weights of all members would not fit in memory
