"""The supernet: its members are the models they stand for, and a training step is one of theirs."""

import collections
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posmlp import create_model
from posmlp.config import RecipeError, load_recipe
from posmlp.errors import UserError
from posmlp.learn.learner import Learner
from posmlp.model.spec import Architecture, Choices
from tests.helpers.batches import make_batch

CHOICES = {
    "blocks": [
        ["parallel", "cascade_ts", "cascade_st", "joint", "temporal"],
        ["parallel", "joint"],
        ["spatial"],
        ["cascade_ts"],
    ],
    "groups": [[1, 4, 16], [1, 4, 16], [8], [1, 16]],
    "depths": [[1, 2], [1, 2, 4], [1], [1, 3]],
}
OWN = {"blocks": ("joint", "parallel", "spatial", "cascade_ts"), "groups": (4, 16, 8, 1), "depths": (2, 2, 1, 3)}
ARCHITECTURES = st.builds(
    Architecture, **{key: st.tuples(*map(st.sampled_from, stages)) for key, stages in CHOICES.items()}
)


def tiny(**overrides):
    """A supernet in fp64 whose parameters are all random, none zero or one."""
    torch.manual_seed(0)
    model = create_model("tiny", num_classes=7, choices=CHOICES, **(OWN | overrides)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def alone(architecture):
    return create_model("tiny", num_classes=7, **dataclasses.asdict(architecture)).double().eval()


def clips(count=2):
    return torch.randn(count, 3, 4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- the model ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(ARCHITECTURES)
def test_a_member_is_the_model_of_its_architecture(architecture):
    """Its weights fit ``create_model``, which then computes the same; all of them are the supernet's own tensors."""
    net = tiny()
    member, model = net.member(architecture), alone(architecture)
    model.load_state_dict(member.state_dict())
    torch.testing.assert_close(member(clips()), model(clips()))
    own = {id(tensor) for tensor in net.state_dict(keep_vars=True).values()}
    assert {id(tensor) for tensor in member.state_dict(keep_vars=True).values()} <= own


def test_out_of_training_it_is_its_own_architecture():
    net = tiny()
    net.draw(0, 0)
    own = Architecture(**OWN)
    assert net.drawn != own
    model = alone(own)
    model.load_state_dict(net.member(own).state_dict())
    torch.testing.assert_close(net(clips()), model(clips()))
    assert [f.shape for f in net.features(clips())] == [f.shape for f in model.features(clips())]


@settings(max_examples=30)
@given(ARCHITECTURES)
def test_a_training_step_is_one_of_the_member_alone(architecture):
    """Gradients, statistics and weights after a step, against the same model by itself; all else stays."""
    net = tiny()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = alone(architecture)
    model.load_state_dict(net.member(architecture).state_dict())
    for trained in (net.train(), model.train()):
        net.drawn = architecture
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        trained(clips(4)).square().sum().backward()
        optimizer.step()
    after = net.member(architecture).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(after[name], tensor)
    path = {id(tensor) for tensor in net.member(architecture).state_dict(keep_vars=True).values()}
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert (id(tensor) in path) or torch.equal(tensor, before[name])


def test_architectures_are_drawn_uniformly_and_by_their_seed_alone():
    net, other = tiny(), tiny()
    drawn = []
    for step in range(2000):
        torch.rand(1)
        net.draw(3, step)
        other.draw(3, step)
        assert net.drawn == other.drawn
        drawn.append(net.drawn)
    assert all(Choices(**CHOICES).contains(architecture) for architecture in drawn)
    for key, stages in CHOICES.items():
        for stage, values in enumerate(stages):
            counts = collections.Counter(getattr(architecture, key)[stage] for architecture in drawn)
            assert set(counts) == set(values)
            assert stats.chisquare([counts[value] for value in values]).pvalue > 1e-3 or len(values) == 1
    other.draw(4, 0)
    assert len({*drawn}) > 200 and [other.drawn] != drawn[:1]


def test_what_is_not_chosen_is_the_models_own():
    net = create_model("tiny", choices={"depths": [[1, 2], [], [], []]}, depths=(2, 2, 1, 1))
    assert [len(stage.blocks) for stage in net.stages] == [2, 2, 1, 1]
    own = create_model("tiny", depths=(2, 2, 1, 1))
    assert net.choices.blocks == (("parallel",),) * 4 and net.choices.groups == ((4,), (8,), (8,), (16,))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in own.parameters())


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"groups": [[3], [8], [8], [16]]}, "stage 1: 16 channels are not divisible by 3 groups"),
        ({"groups": [[1], [], [], []]}, r"stage 1: the model's own groups 4 is not in \(1,\)"),
        ({"blocks": [["parallel", "jiont"], [], [], []]}, r"unknown block type 'jiont' \(did you mean 'joint'\?\)"),
        ({"depths": [[1, 0], [], [], []]}, "must be positive whole numbers"),
        ({"depths": [[1], [2]]}, "choices of depths have 2 entries, expected one for each of 4 stages"),
        ({"depths": 3}, "choices of depths 3 must be one list per stage"),
        ({"widths": []}, r"choices of \['widths'\] are not known; known: \['blocks', 'groups', 'depths'\]"),
    ],
)
def test_impossible_choices_are_told(choices, message):
    with pytest.raises(UserError, match=message):
        create_model("tiny", choices=choices)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.choices.deths=[[1],[1],[1],[1]]", r"model.choices.deths: unknown key \(did you mean 'depths'\?\)"),
        ("train.compile=true", "model.choices works neither with train.compile nor with scaling.parallel fsdp"),
        ("model.choices.groups=[[3],[],[],[]]", "16 channels are not divisible by 3 groups"),
    ],
)
def test_a_recipe_with_wrong_choices_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo", ["model.choices.depths=[[1,2],[],[],[]]", override])


# --- training ----------------------------------------------------------------------------------------------------


def learner():
    config = load_recipe(
        "demo",
        ["model.frames=4", "model.image_size=32", "model.num_classes=8", "train.global_batch=8", "optim.ema=0.9"],
    )
    tree = config.model_dump(mode="json")
    tree["model"] |= {"choices": CHOICES, **OWN}
    config = type(config).model_validate(tree)
    torch.manual_seed(0)
    return Learner(create_model(config.model.name, **config.model.overrides()), config, 5)


@functools.cache
def six_steps():
    """Losses and final weights of six steps in a row."""
    one = learner()
    losses = [one.train_step(make_batch(seed=step)).loss for step in range(6)]
    return losses, one.weights()


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_training_goes_on_as_if_it_had_not_stopped(stop):
    """Also while some units have not been on a path, so that the optimizer knows nothing of them yet."""
    losses, weights = six_steps()
    first = learner()
    again = [first.train_step(make_batch(seed=step)).loss for step in range(stop)]
    second = learner()
    second.load_state_dict(first.weights(), first.state_dict())
    again += [second.train_step(make_batch(seed=step)).loss for step in range(stop, 6)]
    assert again == losses
    final = second.weights()
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights.items())
