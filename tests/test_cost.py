"""Promises of cost.py and counting.py: what is counted by hand, by torch's counter and by the blocks themselves is the same."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fast
from config import ModelConfig, format_step
from conftest import MODEL
from evaluation import __main__ as evaluation
from inference import load_model
from metrics import counting
from metrics.cost import block_costs, config_of, cost_of, cost_table, model_cost, num_parameters, steps_with_signs
from metrics.counting import as_torch_does_it
from model import GPT, Attention
from modules import attention, mamba
from modules.contract import CONFIG, layers_to_try
from modules.flops import attention_flops
from modules.latent_attention import LatentAttention
from modules.registry import all_blocks, build_model
from modules.scores import attention_scores, average
from runs.folder import Run
from runs.presets import PRESETS
from train import train

VOCAB_SIZE = 61
T = 480  # a multiple of every stride and block in the examples
LONG = replace(CONFIG, max_seq_len=T)
HAND = ModelConfig(dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10, mlp_dim=24, max_seq_len=20)
ELEMENTWISE = [getattr(torch.ops.aten, name) for name in ("mul", "mul_", "add", "add_", "sub", "addcmul", "sum", "cumsum")]
# As much as a product with a matrix, half of which is zero; torch does not count it.
SOLUTION = {torch.ops.aten.linalg_solve_triangular: lambda left, right, *_, out_shape, **__: left[-1] * out_shape.numel()}
COUNTED = [
    name for name, block in all_blocks(CONFIG).items() if hasattr(block, "flops_per_token") or issubclass(block, Attention)
]


class TestByHand:
    def test_parameters_of_each_kind(self):
        cost = model_cost(GPT(HAND, VOCAB_SIZE))
        attention, mlp = 24 * (40 + 20 + 20) + 40 * 24, 3 * 24 * 24
        assert cost.by_kind("parameters") == {
            "embedding": VOCAB_SIZE * 24, "RMSNorm": 7 * 24, "Attention": 3 * attention, "MLP": 3 * mlp, "head": 0,
        }  # fmt: skip
        untied = model_cost(GPT(replace(HAND, tied_embeddings=False, positions="learned"), VOCAB_SIZE)).by_kind("parameters")
        assert untied["head"] == VOCAB_SIZE * 24 and untied["position_embedding"] == 20 * 24

    @pytest.mark.parametrize("window, seen", [(None, 10.5), (20, 10.5), (1, 1), (4, (1 + 2 + 3 + 17 * 4) / 20)])
    def test_flops_of_what_is_seen(self, window, seen):
        layers = f"Norm->Attn(window={window})->+->Norm->MLP->+"
        cost = model_cost(GPT(replace(HAND, layers=layers), VOCAB_SIZE))
        matrices = 24 * (40 + 20 + 20) + 40 * 24
        by_kind = cost.by_kind("flops")
        assert by_kind["Attention"] == pytest.approx(3 * (2 * matrices + 2 * 2 * 4 * 10 * seen))
        assert by_kind["MLP"] == 3 * 2 * 3 * 24 * 24 and by_kind["head"] == 2 * 24 * VOCAB_SIZE
        assert by_kind["embedding"] == by_kind["RMSNorm"] == 0
        assert cost.training_flops == 3 * cost.flops == 3 * sum(by_kind.values())

    def test_bytes_of_the_cache(self):
        cost = model_cost(GPT(HAND, VOCAB_SIZE))
        assert (cost.cache_per_token, cost.cache_fixed) == (3 * 2 * 2 * 10 * 4, 0) and cost.cache == 20 * cost.cache_per_token
        cost = model_cost(GPT(replace(HAND, layers="Norm->Attn(window=5)->+"), VOCAB_SIZE))
        assert (cost.cache_per_token, cost.cache_fixed) == (0, 3 * 2 * 2 * 10 * 4 * 4)  # itself and the 4 before it
        cost = model_cost(build_model(replace(HAND, layers="ShortConv(width=4)->Norm->Attn->+"), VOCAB_SIZE))
        assert cost.by_kind("cache_fixed")["ShortConv"] == 3 * 3 * 24 * 4
        assert cost.by_kind("cache_per_token") == {
            "embedding": 0, "ShortConv": 0, "RMSNorm": 0, "Attention": 3 * 2 * 2 * 10 * 4, "head": 0,
        }  # fmt: skip

    def test_what_two_layers_keep_together_is_weighed_once(self):
        kept = torch.zeros(5)
        seen = set()
        assert counting.num_bytes({"a": kept, "b": [kept, (torch.zeros(2, dtype=torch.int64), 7, "x")]}, seen) == 5 * 4 + 2 * 8
        assert counting.num_bytes(kept, seen) == 0

    def test_a_context_of_one_token(self):
        cost = model_cost(GPT(replace(HAND, max_seq_len=1), VOCAB_SIZE))
        assert (cost.cache_per_token, cost.cache_fixed) == (3 * 2 * 2 * 10 * 4, 0)


class TestModels:
    @pytest.mark.parametrize("name", PRESETS)
    def test_the_parts_of_a_preset_are_the_whole(self, name):
        config, vocab_size = config_of(name)
        config = replace(config, max_seq_len=40)
        model = build_model(config, vocab_size)
        cost = model_cost(model)
        assert cost.parameters == num_parameters(model) == sum(weight.numel() for weight in model.parameters())
        assert len({part.place for part in cost.parts}) == len(cost.parts)
        assert cost.training_flops == 3 * cost.flops

    def test_nothing_counted_is_lost(self, monkeypatch):
        """Without what blocks say of themselves, the parts add up to what torch counts for the whole."""
        for block in all_blocks(CONFIG).values():
            if "flops_per_token" in vars(block):
                monkeypatch.delattr(block, "flops_per_token")
        monkeypatch.setattr("metrics.counting.Attention", type(None))
        branches = ["Norm->Attn->+->Norm->MLP->+", "Norm->MLP(gated=False)->+"]
        config = replace(HAND, layers=(branches, "|->MLP->+", "Attn->+->Norm"))
        model = GPT(config, VOCAB_SIZE)
        cost = model_cost(model)
        with as_torch_does_it(model), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 20, dtype=torch.int64))
        assert cost.flops * 20 == counter.get_total_flops() > 0
        steps = [(part.step, part.signs) for part in cost.parts if part.place.startswith("layers.")]
        assert steps == [
            ("Norm", ()), ("Attn", ("+",)), ("Norm", ()), ("MLP", ("+",)), ("Norm", ()), ("MLP(gated=False)", ("+",)),
            ("MLP", ("+",)), ("Attn", ("+",)), ("Norm", ()),
        ]  # fmt: skip

    def test_the_model_is_left_as_it_was(self):
        model = GPT(replace(HAND, dropout=0.5), VOCAB_SIZE).train()
        fast.use(model, kernels=False, loss_chunk=5)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        classes = [type(module) for module in model.modules()]
        state = torch.get_rng_state()
        model_cost(model)
        assert model.training and all(module.training for module in model.modules())
        assert [type(module) for module in model.modules()] == classes and model.loss_chunk == 5
        assert torch.get_rng_state().equal(state) and not any(module._forward_hooks for module in model.modules())
        assert all(weight.equal(weights[name]) for name, weight in model.state_dict().items())
        cost_of("1m", 4)
        assert torch.get_rng_state().equal(state)

    def test_a_model_of_a_plugin(self):
        config = replace(HAND, plugins=("own_models",), model="Recurrent", num_layers=2)
        cost = model_cost(build_model(config, VOCAB_SIZE))
        assert cost.by_kind("flops") == {"table": 0, "lstm": 2 * 2 * 2 * 4 * 24 * 24, "head": 2 * 24 * VOCAB_SIZE, "Recurrent": 0}
        assert (cost.cache_per_token, cost.cache_fixed) == (0, 2 * 2 * 24 * 4)  # states and cells
        cost = model_cost(build_model(replace(config, model="Trigram"), VOCAB_SIZE))
        assert cost.parameters == 2 * VOCAB_SIZE**2 and cost.flops == cost.cache == 0

    def test_a_model_that_says_it_itself(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.config, self.vocab_size = HAND, VOCAB_SIZE
                self.table = nn.Embedding(VOCAB_SIZE, 24)
                self.head = nn.Linear(24, VOCAB_SIZE)

            def forward(self, tokens, targets=None):
                return self.head(self.table(tokens)), None

            def flops_per_token(self, T):
                return 1000.0 + T

        cost = model_cost(Own(), 12)
        assert cost.flops == 1012 and cost.parameters == 24 * VOCAB_SIZE + 25 * VOCAB_SIZE
        del Own.flops_per_token
        assert model_cost(Own(), 12).flops == 2 * 24 * VOCAB_SIZE

    def test_a_block_in_two_places_is_one_part(self):
        model = GPT(HAND, VOCAB_SIZE)
        once = model_cost(model)
        model.layers[2] = model.layers[0]
        cost = model_cost(model)
        assert cost.flops == once.flops and len(cost.parts) == len(once.parts) - 4
        assert cost.parameters == sum(weight.numel() for weight in model.parameters())


class Scores(TorchDispatchMode):
    """How many scores went through a softmax, and how many of them were not hidden, while it is `inside` of a block."""

    def __init__(self):
        super().__init__()
        self.inside, self.made, self.seen = False, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.inside and func.overloadpacket in (torch.ops.aten._softmax, torch.ops.aten._safe_softmax):
            self.made, self.seen = self.made + args[0].numel(), self.seen + (args[0] > -torch.inf).sum().item()
        return func(*args, **(kwargs or {}))


def measure(layer: str, name: str):
    """The block in a layer string; what torch counts for each of T tokens: FLOPs of products, and of elementwise work; and of
    all heads the scores that were made, and those among them that are not hidden."""
    torch.manual_seed(0)
    model = build_model(replace(LONG, layers=layer), VOCAB_SIZE).eval()
    placed = zip(model.layers[0].branches[0].blocks, steps_with_signs(layer), strict=True)
    block = next(block for block, (step, _, _) in placed if step == name)
    scores = Scores()

    def count(counter: FlopCounterMode) -> float:
        counted = 0

        def before(*_):
            nonlocal counted
            counted, scores.inside = counted - counter.get_total_flops(), True

        def after(*_):
            nonlocal counted
            counted, scores.inside = counted + counter.get_total_flops(), False

        hooks = block.register_forward_pre_hook(before), block.register_forward_hook(after)
        with counter:
            model(torch.randint(VOCAB_SIZE, (1, T)), memory=memory)
        for hook in hooks:
            hook.remove()
        return counted / T

    memory = torch.randn(1, T, getattr(block, "memory_dim", LONG.dim))
    formulas = SOLUTION | {operation: (lambda *_, out_shape, **__: out_shape.numel()) for operation in ELEMENTWISE}
    with torch.no_grad(), as_torch_does_it(model):
        with scores:
            products = count(FlopCounterMode(display=False, custom_mapping=SOLUTION))
        elementwise = count(FlopCounterMode(display=False, custom_mapping=formulas)) - products
    return block, products, elementwise, scores.made / T, scores.seen / T


def said_by(block, length: int) -> float:
    return block.flops_per_token(length) if hasattr(block, "flops_per_token") else attention_flops(block, length)


def sinks_written_out(q, k, v, mask, sinks, soft_cap=None, dropout=0.0):
    scores = attention_scores(q, k, soft_cap).masked_fill(~mask, -torch.inf)
    return average(attention.softmax_with_sinks(scores, sinks), v)


@pytest.mark.parametrize("name", COUNTED)
class TestBlocksThatCountForThemselves:
    @pytest.fixture(autouse=True)
    def counted_inside(self, monkeypatch):
        """Mamba step by step, where torch would see one operation, and sinks in the softmax instead of in one more channel."""
        monkeypatch.setattr(mamba, "in_pieces", lambda *given: mamba.step_by_step(*given[:5], state=given[6]))
        monkeypatch.setattr(attention, "masked_attention_with_sinks", sinks_written_out)

    def test_against_torch(self, name):
        """Attention counts what is seen, torch all that is multiplied: the difference is the scores that are hidden.

        All others count products as torch does. Recurrences count the steps of their formula, where torch sees the products of
        whole chunks, half of them hidden, and sums of which one may do several steps: there it is the same order.
        """
        for layer in layers_to_try(name, all_blocks(LONG)[name]):
            block, products, elementwise, made, seen = measure(layer, name)
            said = said_by(block, T)
            if isinstance(block, Attention | LatentAttention):
                narrow = block.head_dim - getattr(block, "v_dim", block.head_dim)  # values padded to the width of keys
                assert said == pytest.approx(products - 4 * block.head_dim * (made - seen) - 2 * narrow * seen)
                assert said < products or made == seen
            elif said != pytest.approx(products):
                hidden = 0
                if made > seen:  # each score is a product of two heads' channels, and the weight of a value
                    hidden = 2 * (block.head_dim + block.value_dim // block.num_heads) * (made - seen)
                assert 0.75 * (products - hidden) <= said <= products + 4 * elementwise

    def test_it_is_not_less_than_its_matrices(self, name):
        for layer in layers_to_try(name, all_blocks(LONG)[name]):
            block = measure(layer, name)[0]
            matrices = sum(2 * inner.weight.numel() for inner in block.modules() if type(inner) is nn.Linear)
            assert all(said_by(block, length) >= matrices for length in (1, 7, 60, T))


def test_a_short_convolution_counts_as_torchs_own():
    block = all_blocks(CONFIG)["ShortConv"](dim=24, width=4)
    with FlopCounterMode(display=False) as counter:
        F.conv1d(torch.zeros(1, 24, 50 + 3), torch.zeros(24, 1, 4), groups=24)
    assert block.flops_per_token(50) * 50 == counter.get_total_flops()


def test_the_whole_square_is_what_torch_counts_for_plain_attention():
    """So what is not seen is (T - 1) / 2 pairs for each token."""
    block, products, _, made, seen = measure("Attn", "Attn")
    assert made == 4 * T and seen == 4 * (T + 1) / 2
    assert products - attention_flops(block, T) == pytest.approx(4 * 4 * 8 * (T - 1) / 2)


class TestTables:
    def test_every_block_of_the_menu_has_a_row(self):
        config = replace(CONFIG, plugins=("picky_blocks",))
        shown = block_costs(config, 16)
        assert list(shown.index) == list(all_blocks(config))
        assert shown.loc["Picky", "in"].endswith("dim=24: Picky needs 640") and shown.loc["Picky"].drop("in").isna().all()
        assert list(shown) == ["in", "parameters", "FLOPs per token", "cache bytes per token", "cache bytes fixed"]
        assert shown.loc["MLP", "FLOPs per token"] == 2 * shown.loc["MLP", "parameters"]
        assert shown.loc["Norm"].drop("in").equals(shown.loc["RMSNorm"].drop("in"))

    def test_presets_side_by_side_and_runs(self, tiny_run):
        shown = cost_table("1m", tiny_run, T=30)
        assert list(shown) == ["1m", "tiny"] and shown.loc["context", "tokens"].tolist() == [30, 30]
        model, _ = load_model(tiny_run)
        assert shown.loc[("parameters", "all"), "tiny"] == num_parameters(model)
        for label in ("parameters", "FLOPs per token", "cache bytes per token"):
            rows = shown.loc[label]
            assert rows.drop([row for row in rows.index if row.startswith("all")]).sum().tolist() == rows.loc["all"].tolist()
        assert (shown.loc["FLOPs per token"].loc["all, in training"] == 3 * shown.loc["FLOPs per token"].loc["all"]).all()

    def test_a_layer_string_is_priced_at_the_size_of_another(self):
        layers, model = "Norm->ForgettingAttn->+->Norm->MLP->+", PRESETS["1m"].model
        plugins = ("experiments.example.blocks",)
        assert config_of(layers, plugins, sizes="1m") == (replace(model, layers=layers, plugins=plugins), 1027)
        assert config_of("('MLP', 'Attn')", sizes="1m")[0] == replace(model, layers=("MLP", "Attn"), num_layers=4)
        shown = cost_table("1m", layers, T=8, plugins=plugins)
        extra = shown.loc[("parameters", "all")].diff().iloc[-1]
        assert extra == 5 * (128 * 4 + 4)  # the gates

    def test_a_run_goes_before_a_preset_of_its_name(self, make_config):
        next(train(MODEL, make_config(), "1m"))
        assert config_of("1m") == (MODEL, 131) and config_of("2m")[0] == PRESETS["2m"].model

    def test_a_group_of_seeds_stands_for_its_runs(self, make_run):
        make_run("mine-seed0", group="mine"), make_run("mine-seed1", seed=1, group="mine")
        assert config_of("mine") == config_of("mine-seed1")

    def test_in_the_terminal(self, capsys):
        words = ["1m", "Norm->ForgettingAttn->+", "--plugins", "experiments.example.blocks", "--T", "8"]
        evaluation.run(["cost", *words])
        shown = capsys.readouterr().out
        assert "993,024" in shown and "ForgettingAttn" in shown and "Attention" in shown
        with pytest.raises(ValueError, match=r"'gemma2_lik' is neither a preset nor a run\. Did you mean 'gemma2_like'"):
            evaluation.run(["cost", "gemma2_lik"])
        for words, told in (([], "name presets, runs or layer strings"), (["1m", "--T", "0"], "give at least 1")):
            with pytest.raises(SystemExit, match="2"):
                evaluation.main(["cost", *words])
            assert told in capsys.readouterr().err


def test_a_layer_string_and_its_steps():
    steps = steps_with_signs("|->Norm->Attn(window=64, norm='LayerNorm')->+->|->MLP")
    assert steps == [("Norm", {}, ()), ("Attn", {"window": 64, "norm": "LayerNorm"}, ("+", "|")), ("MLP", {}, ())]
    assert format_step(*steps[1][:2]) == "Attn(window=64, norm='LayerNorm')" and format_step("MLP", {}) == "MLP"


def test_a_run_logs_what_it_has_spent(tiny_run):
    log = Run(tiny_run).log()
    assert log["flops"].tolist() == (log["tokens"] * cost_of(tiny_run).training_flops).tolist()
