"""Promises of layers in brackets: the grammar, the blocks that hold them, and whatever looks inside."""

import io
import pickle
from dataclasses import replace

import pytest
import torch
from errors import one_line_error

import fast
from config import PRE_NORM, ModelConfig, TrainConfig, format_step, from_json, layer_steps, to_json
from conftest import MODEL
from evaluation.diff import diff
from fast.blocks import PLAIN
from inference import Sampling, generate_tokens
from metrics.cost import config_of, model_cost
from model import GPT, IGNORE, Attention, causal_mask, masked_attention, rope_table, story_starts
from modules.contract import CONFIG, ContractError, check_block, randomised
from modules.model_contract import check_model, try_out
from modules.registry import build_branch, build_model
from runs.command_line import read_layers, write_layers
from tools import show_shapes
from training.optim import build_optimizers, step_optimizers

VOCAB_SIZE = 50
PLUGIN = replace(CONFIG, plugins=("nested_blocks",))


def built(layers, **changes) -> GPT:
    torch.manual_seed(0)
    return build_model(replace(MODEL, layers=layers, **changes), VOCAB_SIZE)


def some_tokens(B=2, T=20):
    return torch.randint(VOCAB_SIZE, (B, T), generator=torch.Generator().manual_seed(0))


class TestGrammar:
    @pytest.mark.parametrize(
        "text, step",
        [
            ("3 x [Norm->MLP->+]", ("Repeat", {"layer": "Norm->MLP->+", "times": 3})),
            ("2 x [3 x [MLP]->Norm]", ("Repeat", {"layer": "3 x [MLP]->Norm", "times": 2})),
            ("Mix([MLP(a=[1, [2]])->+], keep=0.5, to=[3])", ("Mix", {"layer": "MLP(a=[1, [2]])->+", "keep": 0.5, "to": [3]})),
            ("Mix([MLP])", ("Mix", {"layer": "MLP"})),
            ("Repeat([MLP], times=2, turn_embedding=True)", ("Repeat", {"layer": "MLP", "times": 2, "turn_embedding": True})),
            ("MLP(a=[1], b='x')", ("MLP", {"a": [1], "b": "x"})),
        ],
    )
    def test_a_step_is_read_and_written(self, text, step):
        assert layer_steps(f"Norm->{text}->+") == [("Norm", {}), step, ("+", {})]
        assert format_step(*step) == text

    def test_spaces_do_not_matter(self):
        assert layer_steps("2x[ MLP ] -> Mix( [MLP], a=1 )") == layer_steps("2 x [MLP]->Mix([MLP], a=1)")

    def test_json_and_the_command_line_keep_them(self):
        nested = ("2 x [Norm->3 x [MLP->+]->+]", ["StochasticDepth([Norm->Attn->+], keep=0.5)", "Norm->MLP->+"])
        config = ModelConfig(layers=nested)
        assert from_json(ModelConfig, to_json(config)) == config
        for layers in nested:
            assert read_layers(write_layers(layers)) == layers
        assert config_of("2 x [MLP]")[0].layers == "2 x [MLP]"  # for cost, diff and probes

    @pytest.mark.parametrize(
        "layers, place, problem",
        [
            ("Norm->3 x [Norm->Atn->+]->+", "Norm->3 x [Norm->»Atn«->+]->+", "no block is called 'Atn'. Did you mean 'Attn'?"),
            ("2 x [MLP->2 x [Norm->MLP(dm=3)]]", "2 x [MLP->2 x [Norm->»MLP(dm=3)«]]", "MLP has no option 'dm'"),
            ("2 x [Norm->->+]->+", "2 x [Norm->»«->+]->+", "an empty step"),
            ("2 x [+->MLP]", "2 x [»+«->MLP]", "this + has nothing to add"),
            ("MLP->2 x [|]", "MLP->2 x [»|«]", "it has no block"),
            ("Norm->2 x [MLP->+", "Norm->»2 x [MLP->+«", "close each [ with a ]"),
            ("Norm->MLP]->+", "Norm->»MLP]«->+", "close each [ with a ]"),
            ("2 x MLP->+", "»2 x MLP«->+", "3 x [layer]"),
            ("-1 x [MLP]->+", "»-1 x [MLP]«->+", "cannot be read"),
            ("0 x [MLP]->+", "»0 x [MLP]«->+", "times=0: give a whole number of at least 1"),
            ("Norm->MLP([Norm])->+", "Norm->»MLP([Norm])«->+", "MLP does not hold a layer: write it without the brackets"),
            ("Repeat(times=2)", "»Repeat(times=2)«", "Repeat needs a layer in brackets: write Repeat([Norm->MLP->+])"),
            ("Repeat([MLP])", "»Repeat([MLP])«", "Repeat needs 'times'"),
            ("Repeat([MLP], time=2)", "»Repeat([MLP], time=2)«", "Did you mean 'times'?"),
            ("Repeat([MLP], times=2.5)", "»Repeat([MLP], times=2.5)«", "Repeat(times=2.5): it must be int"),
            ("Repeat(layer='MLP', times=2)", "»Repeat(layer='MLP', times=2)«", "a layer stands in brackets"),
            ("2 x [StochasticDepth([MLP->+], keep=0)]", "2 x [»StochasticDepth([MLP->+], keep=0)«]", "keep=0: give"),
            ("MixtureOfDepths([MLP->+], share=1.0)", "»MixtureOfDepths([MLP->+], share=1.0)«", "share=1.0: give a share"),
            ("StochasticDepth([Norm->Attn])->+", "»StochasticDepth([Norm->Attn])«->+", "adds nothing to its input: put a +"),
            ("TakesNoInputs([MLP])", "»TakesNoInputs([MLP])«", "the forward of TakesNoInputs must take **inputs"),
        ],
    )
    def test_a_mistake_in_brackets_is_marked_in_one_line(self, layers, place, problem):
        one_line_error(lambda: build_model(replace(PLUGIN, layers=layers), VOCAB_SIZE), "layers=", place, problem)

    def test_the_error_is_its_message_also_from_another_process(self):
        with pytest.raises(ValueError) as caught:
            layer_steps("2 x [Norm->3]")
        assert caught.value.args == (str(caught.value),) and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class TestRepeat:
    """Two turns of a layer are two layers with the same weights."""

    LAYER = "Norm->Attn(window=6)->+->Norm->ShortConv->+->Norm->MLP->+"

    def pair(self):
        looped, stacked = built(f"2 x [{self.LAYER}]"), built(self.LAYER, num_layers=2)
        first = looped.layers[0].branches[0].blocks[0].layer
        for name, weight in first.state_dict().items():  # initialization too: both add to the stream as often
            assert stacked.layers[0].branches[0].state_dict()[name].equal(weight)
        stacked.load_state_dict(looped.state_dict(), strict=False)
        stacked.layers[1] = stacked.layers[0]
        return looped, stacked

    def test_loss_and_gradients_on_packed_stories(self):
        tokens, story_ids = some_tokens(), (torch.arange(20) // 7).expand(2, 20)
        results = []
        for model in self.pair():
            _, loss = model.train()(tokens, tokens.masked_fill(tokens < 5, IGNORE), story_ids=story_ids)
            loss.backward()
            results.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_generation_token_by_token(self):
        written = [
            list(generate_tokens(model.eval(), [[1, 2, 3], [4]], 0, [15, 15], Sampling(), seed=0, use_cache=use_cache))
            for model in self.pair() for use_cache in (True, False)
        ]  # fmt: skip
        assert written[0] == written[1] == written[2] == written[3]

    def test_cost_counts_weights_once_and_work_each_turn(self):
        looped, stacked = map(model_cost, (built(f"2 x [{self.LAYER}]"), built(self.LAYER, num_layers=2)))
        assert looped.flops == stacked.flops and looped.cache == stacked.cache > 0
        layer = model_cost(built(self.LAYER, num_layers=1))
        assert looped.parameters == layer.parameters < stacked.parameters

    def test_a_turn_embedding_is_added_before_each_turn(self):
        repeat = randomised(build_branch("Repeat([Norm->MLP->+], times=3, turn_embedding=True)", MODEL, VOCAB_SIZE)).blocks[0]
        x = y = torch.randn(2, 4, MODEL.dim)
        for turn in range(3):
            y = repeat.layer(y + repeat.turn_bias[turn])
        torch.testing.assert_close(repeat(x), y)


class TestStochasticDepth:
    def branch(self, keep=0.6):
        return randomised(build_branch(f"StochasticDepth([{PRE_NORM}], keep={keep})", MODEL, VOCAB_SIZE))

    def test_evaluation_scales_what_the_layer_adds(self):
        branch, x = self.branch().eval(), torch.randn(2, 5, MODEL.dim)
        torch.testing.assert_close(branch(x), x + 0.6 * (branch.blocks[0].layer(x) - x))

    def test_training_runs_the_whole_layer_or_skips_it(self):
        torch.manual_seed(0)
        branch, x = self.branch().train(), torch.randn(2, 5, MODEL.dim)
        whole, outputs = branch.blocks[0].layer(x), [branch(x) for _ in range(400)]
        num_skipped = sum(y is x for y in outputs)
        assert all(y is x or y.equal(whole) for y in outputs) and abs(num_skipped / 400 - 0.4) < 0.08

    def test_training_costs_the_share_that_is_kept(self):
        layer, skipped = (model_cost(built(layers)) for layers in (PRE_NORM, f"StochasticDepth([{PRE_NORM}], keep=0.5)"))
        (inside,) = {cost.flops - cost.by_kind("flops")["head"] for cost in (layer, skipped)}
        share = (skipped.training_flops - layer.training_flops) / (3 * inside)
        assert abs(share + 0.5) < 0.2

    def test_the_contract_passes_where_most_draws_skip(self):
        check_block("StochasticDepth", layer=f"StochasticDepth([{PRE_NORM}], keep=0.2)")


class TestMixtureOfDepths:
    def block(self, share=0.5):
        torch.manual_seed(0)
        return randomised(build_branch(f"MixtureOfDepths([Norm->Attn->+], share={share})", MODEL, VOCAB_SIZE)).eval().blocks[0]

    @pytest.mark.parametrize("packed", [False, True])
    def test_it_is_attention_among_the_selected_tokens(self, packed):
        """The same by a mask over all tokens, instead of a shorter sequence."""
        block, T = self.block(), 20
        norm, attention = block.layer.blocks
        x = torch.randn(3, T, MODEL.dim)
        rope = tuple(table[None] for table in rope_table(T, attention.head_dim, 10_000.0))
        start = story_starts((torch.arange(T) // 8).expand(3, T)) if packed else None
        scores = block.w_router(x)[..., 0]
        selected = scores > block.threshold
        assert 0.2 < selected.float().mean() < 0.8

        q, k, v = attention.project(norm(x), rope)
        visible = causal_mask(T, T, start) & selected[:, None, None]
        visible = visible | torch.eye(T, dtype=torch.bool)  # no row of the mask may be empty
        update = attention.w_out(masked_attention(q, k, v, visible).transpose(1, 2).reshape(3, T, -1))
        expected = x + (selected * scores.sigmoid())[..., None] * update
        torch.testing.assert_close(block(x, shared={}, rope=rope, story_start=start), expected)

    def test_the_threshold_follows_the_share(self):
        block = self.block(share=0.25).train()
        for _ in range(60):
            block(torch.randn(4, 30, MODEL.dim), shared={})
            block.after_step()
            reported = block.report()
        assert abs(reported["selected"] - 0.25) < 0.08 and block.report() == {}

    def test_recomputing_a_step_changes_nothing(self):
        """As gradient checkpointing does."""
        block, x = self.block().train(), torch.randn(2, 10, MODEL.dim)
        assert block(x, shared={}).equal(block(x, shared={}))

    def test_losses_inside_are_a_mean_over_the_rows(self):
        model = built("MixtureOfDepths([Norm->MoE(num_experts=3)->+])").train()
        tokens = some_tokens(B=1)
        losses = []
        for rows in (1, 4):
            model(tokens.expand(rows, -1), tokens.expand(rows, -1))
            losses.append(model.losses["router_balance"])
        torch.testing.assert_close(*losses)


class TestWhoLooksInside:
    def test_fast_classes_replace_inner_blocks(self):
        model = built("2 x [Norm->Attn->+]")
        fast.use(model, kernels=False)
        (attention,) = [module for module in model.modules() if isinstance(module, Attention)]
        assert PLAIN[type(attention)] is Attention

    def test_equal_turns_are_shown_once(self):
        model, page = built("3 x [Norm->MLP->+]"), io.StringIO()
        with torch.no_grad(), show_shapes(model, lines=False, file=page):
            model(some_tokens())
        assert "Branch × 3" in page.getvalue()

    def test_optimizers_and_reports_reach_inner_blocks(self):
        model = built("Norm->Attn->+->2 x [Repeat([Norm->MoE(num_experts=3)->+], times=1)]").train()
        optimizers = build_optimizers(model, TrainConfig())
        _, loss = model(some_tokens(), some_tokens())
        loss.backward()
        (path, moe), *others = [(path, block) for path, block in model.named_modules() if hasattr(block, "report")]
        assert path.endswith("blocks.2.layer.blocks.0.layer.blocks.1") and not others
        assert moe.report()["dead_experts"] >= 0 and moe.uses_in_step.any()
        step_optimizers(model, optimizers)
        assert not moe.uses_in_step.any()

    def test_diff_shows_what_is_in_brackets(self):
        left, right = (replace(MODEL, layers=layers) for layers in (PRE_NORM, "2 x [Norm->Attn->+]->Norm->MLP->+"))
        (group,) = [group for group in diff(left, right).groups if "layers" in group.title("left")]
        rows = [f"{row.mark}{(row.left or row.right).step}" for row in group.rows]
        assert rows == ["→2 x […]", "=Norm", "≠Attn", "=+", "→]", "=Norm", "=MLP", "=+"]

    def test_what_ends_inside_brackets_with_a_skip_is_no_mistake(self, capsys):
        try_out(built("Norm->Attn->+->2 x [Norm->MLP->+]"))
        assert capsys.readouterr().err == ""
        try_out(built("Norm->Attn->+->2 x [Norm->MLP->+->Norm->MLP]"))
        assert "no + after MLP" in capsys.readouterr().err


class TestPlugins:
    def test_a_block_that_holds_a_layer_passes(self):
        check_block("Twice", PLUGIN)

    @pytest.mark.parametrize(
        "name, problem",
        [
            ("HandsNothingOn", "with a cache, token by token, it gives another result"),
            ("HandsNoCacheOn", "with a cache, token by token, it gives another result"),
            ("ForgetsTheLayer", "no gradient reaches 0.layer.blocks.0.weight"),
        ],
    )
    def test_one_that_does_not_hand_its_inputs_on_is_named(self, name, problem):
        one_line_error(lambda: check_block(name, PLUGIN), f"the block {name!r} breaks", problem, error=ContractError)

    @pytest.mark.parametrize("layer", ["Twice([Attn->+])", "StochasticDepth([Attn->+])", "MixtureOfDepths([Attn->+])"])
    def test_a_model_with_it_passes(self, layer):
        check_model(replace(PLUGIN, layers=layer), VOCAB_SIZE)

    def test_one_that_mixes_stories_is_named_before_training(self, capsys):
        try_out(build_model(replace(PLUGIN, layers=f"2 x [HandsNothingOn([{PRE_NORM}])]"), VOCAB_SIZE))
        problem = "lets the stories of a row see each other in its block 'Attn' in 'HandsNothingOn' in 'Repeat'"
        assert problem in capsys.readouterr().err
