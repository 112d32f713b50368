"""Models as data: built for the rows, saved, rebuilt bit for bit, loaded from checkpoints."""

import json
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hasten.artefacts import module as artefact
from hasten.core.errors import ConfigError, HastenError
from hasten.core.interfaces import Input

MLP = {"_target_": "hasten.models.mlp.MLP", "input_shape": None, "num_outputs": None, "hidden": [6, 4]}
RESNET = {"_target_": "hasten.models.resnet.ResNet", "widths": [4, 8], "num_blocks": 1}


PAIR = (Input(name="ids", shape=(6,), dtype="int64", dynamic=(0,)), Input(name="size", shape=(2,)))


def build(arch, shape=(5,), num_outputs=3, seed=0, **more):
    return artefact.build(arch, [Input(shape=shape)], (num_outputs,), seed=seed, **more)


def saved(folder, arch, model, surgery=()):
    folder.mkdir()
    artefact.save(folder, arch, model, surgery)
    return folder


def assert_same_weights(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package of the user's own, importable by the name that the fixture gives."""
    code = """
        from pathlib import Path

        import torch
        from torch import nn

        class Tied(nn.Module):
            def __init__(self, num_classes, width=5):
                super().__init__()
                self.into, self.back = nn.Linear(width, width), nn.Linear(width, width)
                self.back.weight = self.into.weight
                self.head = nn.Linear(width, num_classes)
                self.register_buffer("noise", torch.rand(width), persistent=False)

            def forward(self, x):
                return self.head(self.back(self.into(x)) + self.noise)

        class Lazy(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.LazyLinear(3)

            def forward(self, x):
                return self.layer(x)

        class Stateful(nn.Linear):
            def get_extra_state(self):
                return {"a": 1}

        class Pair(nn.Linear):
            def forward(self, x):
                return super().forward(x), x

        class Picky(nn.Linear):
            def __init__(self):
                raise ValueError("mood must be good, got bad")

        class Embedding(nn.Module):
            # takes two inputs by their names, in another order than the data's
            def __init__(self, vocabulary_size, num_outputs, input_shape=None):
                super().__init__()
                self.words, self.head = nn.Embedding(vocabulary_size, 4), nn.Linear(6, num_outputs)

            def forward(self, size, ids):
                return self.head(torch.cat([self.words(ids).mean(1), size], 1))

        class Downloaded(nn.Linear):
            # learns its sizes elsewhere and says how to be built without
            def __init__(self, folder=None, in_features=None, out_features=3):
                super().__init__(in_features or int(Path(folder).read_text()), out_features)

            def portable_arguments(self):
                return {"folder": None, "in_features": self.in_features}

        class Scalar(nn.Linear):
            def forward(self, x):
                return super().forward(x).sum()

        def factory(num_classes, **others):
            return nn.Sequential(nn.Flatten(), nn.Linear(5, num_classes))

        def no_module(**others):
            return 3
    """
    (tmp_path / "users_nets.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    return "users_nets"


def test_fills_in_what_the_data_decide_and_nothing_else():
    model, arch = build(MLP, shape=(2, 4), num_outputs=7)
    assert arch == {**MLP, "input_shape": [2, 4], "num_outputs": 7}
    assert [layer.weight.shape[::-1] for layer in model.layers if isinstance(layer, nn.Linear)] == [
        (8, 6),
        (6, 4),
        (4, 7),
    ]
    assert model.training
    assert MLP["input_shape"] is None


def test_fills_in_what_is_absent(library):
    assert build(RESNET, shape=(1, 4, 4))[1] == {**RESNET, "input_shape": [1, 4, 4], "num_outputs": 3}
    assert build({"_target_": f"{library}.Tied"})[1] == {"_target_": f"{library}.Tied", "num_classes": 3}


def test_keeps_what_the_config_says():
    told = r"^model\.arch: MLP gives 5 outputs a row, data\.targets has 3 outputs \(for classes: labels 0\.\.2\)"
    with pytest.raises(ConfigError, match=told):
        build({**MLP, "num_outputs": 5})


def test_constructs_by_a_function_too(library):
    model, arch = build({"_target_": f"{library}.factory"})
    assert isinstance(model, nn.Sequential)
    assert arch["num_classes"] == 3


def test_the_seed_decides_the_initial_weights_and_the_global_generator_goes_on():
    state = torch.get_rng_state()
    one, two, other = (build(MLP, seed=seed)[0] for seed in (1, 1, 2))
    assert_same_weights(one, two)
    assert not torch.equal(one.layers[1].weight, other.layers[1].weight)
    assert torch.equal(state, torch.get_rng_state())


def test_trying_the_model_leaves_no_trace():
    model, _ = build(RESNET, shape=(1, 4, 4))
    assert all(module.training for module in model.modules())
    assert model.stem[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("arch", "problem"),
    [
        ({"_target_": "users_nets.Nothing"}, r"student\.arch\._target_=users_nets\.Nothing does not import"),
        ({"_target_": "users_nets.Lazy"}, r"student\.arch: Lazy has lazy layers"),
        ({"_target_": "users_nets.Picky"}, r"student\.arch: .*Picky can't be constructed: mood must be good, got bad"),
        (
            {"_target_": "users_nets.no_module"},
            r"student\.arch\._target_=.*no_module gives a int, not a torch\.nn\.Module",
        ),
        ({"_target_": "users_nets.Tied", "wide": 3}, r"student\.arch: .*Tied can't be constructed: .*wide"),
        ({"_target_": "users_nets.Tied", "width": 9}, r"student\.arch: Tied does not run on rows of shape \(5,\): "),
        (
            {"_target_": "users_nets.Pair", "in_features": 5, "out_features": 3},
            r"student\.arch: Pair must give \(2, 3\) for 2 rows of shape \(5,\), got tuple",
        ),
        (
            {"_target_": "users_nets.Scalar", "in_features": 5, "out_features": 3},
            r"student\.arch: Scalar must give \(2, 3\) for 2 rows of shape \(5,\), got \(\)",
        ),
    ],
)
def test_refuses_a_model_that_can_not_be_used(library, arch, problem):
    with pytest.raises(ConfigError, match=problem):
        build(arch, key="student.arch")


def test_several_inputs_go_in_by_their_names(library):
    facts = {"vocabulary_size": 9}
    model, arch = artefact.build({"_target_": f"{library}.Embedding"}, PAIR, (3,), seed=0, facts=facts)
    assert arch == {"_target_": f"{library}.Embedding", "input_shape": [6], "num_outputs": 3, **facts}
    rows = {"ids": torch.randint(9, (4, 5)), "size": torch.rand(4, 2)}
    expected = model.head(torch.cat([model.words(rows["ids"]).mean(1), rows["size"]], 1))
    assert torch.equal(artefact.forward(model, rows), expected)
    assert torch.equal(artefact.forward(model, dict(reversed(rows.items()))), expected)


def test_an_input_of_another_name_is_told(library):
    inputs = (PAIR[0], Input(name="length", shape=(2,)))
    arch = {"_target_": f"{library}.Embedding", "vocabulary_size": 9}
    with pytest.raises(ConfigError, match=r"does not run on rows of shape ids \(6,\), length \(2,\): .*length"):
        artefact.build(arch, inputs, (3,), seed=0)


def test_one_input_goes_in_as_it_is_whatever_its_name():
    layer, rows = nn.Linear(2, 3), torch.rand(4, 2)
    assert torch.equal(artefact.forward(layer, {"pixels": rows}), layer(rows))


def test_facts_of_the_data_are_no_match_for_what_the_config_says(library):
    arch = {"_target_": f"{library}.Embedding", "vocabulary_size": 20}
    model, filled = artefact.build(arch, PAIR, (3,), seed=0, facts={"vocabulary_size": 9, "languages": 2})
    assert (model.words.num_embeddings, filled["vocabulary_size"]) == (20, 20)
    assert "languages" not in filled


def test_where_the_task_leaves_it_open_the_model_decides_on_its_outputs():
    inputs = [Input(shape=(5,))]
    model, _ = artefact.build({**MLP, "num_outputs": 7}, inputs, None, seed=0)
    assert artefact.output_shape(model, inputs) == (7,)
    assert model.training
    with pytest.raises(ConfigError, match=r"^model\.arch\.num_outputs has no value, and the data don't say it: "):
        artefact.build(MLP, inputs, None, seed=0)


def test_a_model_that_gives_one_number_for_all_rows_is_refused_whatever_the_task(library):
    arch = {"_target_": f"{library}.Scalar", "in_features": 5, "out_features": 3}
    with pytest.raises(ConfigError, match=r"Scalar must give \(2, \.\.\.\) for 2 rows of shape \(5,\), got \(\)"):
        artefact.build(arch, [Input(shape=(5,))], None, seed=0)


def test_what_a_model_learned_elsewhere_goes_with_its_artefact(tmp_path, library):
    (tmp_path / "size.txt").write_text("5")
    model, arch = build({"_target_": f"{library}.Downloaded", "folder": str(tmp_path / "size.txt")})
    assert arch == {"_target_": f"{library}.Downloaded", "folder": None, "in_features": 5}
    (tmp_path / "size.txt").unlink()
    assert_same_weights(artefact.rebuild(saved(tmp_path / "model", arch, model)), model)


def test_examples_are_rows_that_any_model_takes():
    rows = artefact.example(PAIR, rows=3)
    assert {name: (tuple(values.shape), values.dtype) for name, values in rows.items()} == {
        "ids": ((3, 6), torch.int64),
        "size": ((3, 2), torch.float32),
    }


def test_refuses_a_model_for_other_rows():
    with pytest.raises(ConfigError, match=r"^model\.arch: .*ResNet can't be constructed: ResNet needs input_shape"):
        build(RESNET, shape=(5,))


@pytest.mark.parametrize(("arch", "shape"), [(MLP, (5,)), (RESNET, (1, 6, 6))], ids=["mlp", "resnet"])
def test_what_is_rebuilt_gives_the_same_outputs_bit_for_bit(tmp_path, arch, shape):
    model, filled = build(arch, shape=shape)
    x = torch.rand(9, *shape)
    model(x)  # moves the statistics of batch normalization
    rebuilt = artefact.rebuild(saved(tmp_path / "model", filled, model))
    assert_same_weights(rebuilt, model)
    assert torch.equal(rebuilt(x), model.eval()(x))
    assert not any(module.training for module in rebuilt.modules())
    assert [p.requires_grad for p in rebuilt.parameters()] == [p.requires_grad for p in model.parameters()]


def test_rebuilt_weights_do_not_hang_on_the_file(tmp_path):
    model, filled = build(MLP)
    folder = saved(tmp_path / "model", filled, model)
    rebuilt = artefact.rebuild(folder)
    file = folder / "weights.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_same_weights(rebuilt, model)


def test_shared_weights_are_kept_once_and_stay_shared(tmp_path, library):
    model, arch = build({"_target_": f"{library}.Tied"})
    folder = saved(tmp_path / "model", arch, model)
    rebuilt = artefact.rebuild(folder)
    assert rebuilt.back.weight is rebuilt.into.weight
    x = torch.rand(4, 5)
    assert torch.equal(rebuilt(x), model(x))


def test_buffers_that_a_state_dict_leaves_out_are_kept(tmp_path, library):
    model, arch = build({"_target_": f"{library}.Tied"})
    assert "noise" not in model.state_dict()
    assert torch.equal(artefact.rebuild(saved(tmp_path / "model", arch, model)).noise, model.noise)


def test_weights_of_another_type_come_back_in_it(tmp_path):
    model, filled = build(MLP)
    rebuilt = artefact.rebuild(saved(tmp_path / "model", filled, model.to(torch.bfloat16)))
    assert {p.dtype for p in rebuilt.parameters()} == {torch.bfloat16}
    assert_same_weights(rebuilt, model)


def test_channels_last_weights_come_back_the_same(tmp_path):
    model, filled = build(RESNET, shape=(1, 6, 6))
    assert_same_weights(
        artefact.rebuild(saved(tmp_path / "model", filled, model.to(memory_format=torch.channels_last))), model
    )


def test_the_same_model_writes_the_same_bytes_without_pickles(tmp_path):
    model, filled = build(RESNET, shape=(1, 6, 6))
    one, two = (saved(tmp_path / name, filled, model) for name in ("one", "two"))
    assert sorted(file.name for file in one.iterdir()) == ["module.json", "weights.safetensors"]
    assert all((one / file.name).read_bytes() == file.read_bytes() for file in two.iterdir())


def test_refuses_to_save_state_that_is_no_tensor(tmp_path, library):
    model, arch = build({"_target_": f"{library}.Stateful", "in_features": 5, "out_features": 3})
    with pytest.raises(HastenError, match=r"Stateful can't be saved as data: .*_extra_state"):
        saved(tmp_path / "model", arch, model)


def narrowed(model):
    """The model with 2 of the 6 units of its first hidden layer cut off by hand."""
    first, second = model.layers[1], model.layers[3]
    first.weight, first.bias = nn.Parameter(first.weight[:4].detach()), nn.Parameter(first.bias[:4].detach())
    second.weight = nn.Parameter(second.weight[:, :4].detach())
    first.out_features = second.in_features = 4
    return model


def test_surgery_says_what_changed_in_size():
    before, after = build(MLP)[0], narrowed(build(MLP)[0])
    assert artefact.resized(before, after) == {
        "layers.1": {"attributes": {"out_features": 4}, "tensors": {"weight": [4, 5], "bias": [4]}},
        "layers.3": {"attributes": {"in_features": 4}, "tensors": {"weight": [4, 4]}},
    }
    assert artefact.resized(before, before) == {}


def test_surgery_is_replayed(tmp_path):
    (before, filled), after = build(MLP), narrowed(build(MLP)[0])
    folder = saved(tmp_path / "model", filled, after, [{"resized": artefact.resized(before, after)}])
    rebuilt = artefact.rebuild(folder)
    assert_same_weights(rebuilt, after)
    assert (rebuilt.layers[1].out_features, rebuilt.layers[3].in_features) == (4, 4)
    assert len(artefact.surgery(folder)) == 1


def test_sizes_that_are_tuples_stay_tuples(tmp_path):
    before, after = nn.LayerNorm(4), nn.LayerNorm(2)
    changes = json.loads(json.dumps(artefact.resized(before, after)))
    arch = {"_target_": "torch.nn.LayerNorm", "normalized_shape": 4}
    rebuilt = artefact.rebuild(saved(tmp_path / "model", arch, after, [{"resized": changes}]))
    assert rebuilt.normalized_shape == (2,)


def test_surgery_does_not_add_modules():
    with pytest.raises(ValueError, match="modules were added or removed: 2"):
        artefact.resized(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()))


def test_constructs_trusted_classes_alone(tmp_path, library):
    model, filled = build(MLP)
    folder = saved(tmp_path / "model", filled, model)
    artefact.rebuild(folder, trusted=("hasten",))
    artefact.rebuild(folder, trusted=("hasten.models.mlp.MLP",))
    for trusted in ((), ("hast",), (library, "torch.nn")):
        with pytest.raises(ConfigError, match=r"module\.json: hasten\.models\.mlp\.MLP is not in a trusted package"):
            artefact.rebuild(folder, trusted=trusted)


def test_refuses_weights_that_do_not_fit(tmp_path):
    model, filled = build(MLP)
    folder = saved(tmp_path / "model", {**filled, "hidden": [6, 4, 9]}, model)
    with pytest.raises(HastenError, match=r"weights\.safetensors does not fit .*MLP: 2 missing: layers\.7\.weight"):
        artefact.rebuild(folder)


def checkpointed(file, state):
    (save_file if file.suffix == ".safetensors" else torch.save)(state, file)
    return file


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_loads_a_state_dict(tmp_path, name):
    trained, fresh = build(RESNET, (1, 4, 4), seed=1)[0], build(RESNET, (1, 4, 4), seed=2)[0]
    artefact.load_weights(fresh, checkpointed(tmp_path / name, trained.state_dict()))
    assert_same_weights(fresh, trained)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model._orig_mod.module."])
def test_strips_the_prefixes_of_wrappers(tmp_path, prefix):
    trained, fresh = build(MLP, seed=1)[0], build(MLP, seed=2)[0]
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    artefact.load_weights(fresh, checkpointed(tmp_path / "last.ckpt", {"epoch": 3, "state_dict": state}))
    assert_same_weights(fresh, trained)


def test_keeps_a_prefix_that_is_the_models_own(tmp_path):
    trained, fresh = (nn.ModuleDict({"model": nn.Linear(2, 2)}) for _ in range(2))
    artefact.load_weights(fresh, checkpointed(tmp_path / "w.pt", trained.state_dict()))
    assert_same_weights(fresh, trained)


def test_does_without_the_counters_of_batches(tmp_path):
    trained, fresh = build(RESNET, (1, 4, 4), seed=1)[0], build(RESNET, (1, 4, 4), seed=2)[0]
    state = {name: value for name, value in trained.state_dict().items() if "num_batches" not in name}
    artefact.load_weights(fresh, checkpointed(tmp_path / "w.pt", state))
    assert_same_weights(fresh, trained)


def test_lists_what_is_missing_too_much_and_of_another_shape(tmp_path):
    model, _ = build(MLP)
    state = dict(model.state_dict())
    del state["layers.1.bias"], state["layers.3.bias"]
    state |= {"head.weight": torch.zeros(1), "layers.5.weight": torch.zeros(10, 4)}
    with pytest.raises(ConfigError) as caught:
        artefact.load_weights(model, checkpointed(tmp_path / "w.pt", state))
    start = f"model.checkpoint={tmp_path / 'w.pt'} does not fit MLP: "
    assert caught.value.problems == (
        f"{start}2 missing: layers.1.bias, layers.3.bias",
        f"{start}1 unexpected: head.weight",
        f"{start}1 of another shape: layers.5.weight (10, 4) instead of (3, 4)",
    )


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"not weights at all, but some text"])
def test_refuses_a_file_that_can_not_be_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^model\.checkpoint=.*{name} can't be read as"):
        artefact.load_weights(nn.Linear(1, 1), tmp_path / name)


def test_refuses_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.checkpoint=.*w\.pt does not exist$"):
        artefact.load_weights(nn.Linear(1, 1), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"weight": 3}, {"state_dict": {"a": "b"}}])
def test_refuses_a_file_without_a_state_dict(tmp_path, content):
    with pytest.raises(ConfigError, match="holds no state dict"):
        artefact.load_weights(nn.Linear(1, 1), checkpointed(tmp_path / "w.pt", content))


def test_never_runs_what_a_checkpoint_carries(tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    with pytest.raises(ConfigError, match="can't be read as"):
        artefact.load_weights(nn.Linear(1, 1), checkpointed(tmp_path / "w.pt", Attack()))


def test_leaves_the_model_alone_that_a_checkpoint_does_not_fit(tmp_path):
    model, _ = build(MLP)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError):
        artefact.load_weights(model, checkpointed(tmp_path / "w.pt", {"layers.1.bias": torch.ones(6)}))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
