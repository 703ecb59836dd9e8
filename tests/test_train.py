"""Promises of train.py and machine.py: it learns, it repeats itself, it goes on where it stopped, it loses nothing."""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from config import TrainConfig, to_json
from conftest import MODEL
from data import dataset
from data.dataset import load_data
from fast import build
from inference import generate, load_model
from metrics.scores import evaluate
from model import GPT, MLP
from runs.command_line import parse
from runs.folder import Run, default_name
from runs.presets import PRESETS, preset
from tokenizer import load_tokenizer
from train import train
from training import checkpoint, setup, stopwatch
from training.checkpoint import Record
from training.report import command, plot_losses, write_report
from training.setup import STOP_SIGNALS
from training.stories import Stories

ROOT = Path(__file__).parent.parent
COLUMNS = [field.name for field in fields(Record) if field.name not in checkpoint.NOT_LOGGED]  # of log_data.csv
CLOCK = ["seconds", "tokens_per_second", "peak_memory_mb", "overhead_seconds"]  # what two equal runs differ in
CHECKPOINT = {"model", "optimizers", "step", "tokens", "best_loss"}


def state(name):
    """What training has reached: weights, optimizers, random numbers, best weights."""
    checkpoint, best = Run(name).load("checkpoint.pth", CHECKPOINT), Run(name).load("model.pth", {"model"})
    return {key: checkpoint[key] for key in (*CHECKPOINT, "random_state")} | {"best": best}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def assert_same(name, other):
    assert equal(state(name), state(other))
    pd.testing.assert_frame_equal(Run(name).log().drop(columns=CLOCK), Run(other).log().drop(columns=CLOCK), check_exact=True)


def losses(records):
    return [(record.step, record.train_loss, record.validation_loss, record.gradient_norm) for record in records]


def take(count, generator):
    """The first records, then leave the generator as `break` does."""
    records = list(itertools.islice(generator, count))
    generator.close()
    return records


def words_of(config, name, model=MODEL):
    """The words after `python train.py` that give such a run."""
    return shlex.split(command(model, config, name))[2:]


def plain(text):
    """Without the boxes and line breaks that tyro draws."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


class TestLearning:
    def test_the_loss_goes_down(self, make_config):
        records = list(train(MODEL, make_config(max_steps=150, eval_every=50), "learner"))
        seen = [record.validation_loss for record in records if record.validation_loss is not None]
        assert len(seen) == 3 and seen[0] > seen[1] > seen[2]
        assert records[-1].train_loss < 0.6 * records[0].train_loss

    @pytest.mark.parametrize("changes", [
        {"mask_stories": True}, {"packing": "padded"}, {"optimizer": "Muon"}, {"dtype": "bfloat16"}, {"grad_clip": None},
        {"schedule": "cosine", "num_restarts": 1}, {"schedule": "wsd"}, {"micro_batch_size": 1, "mask_stories": True},
    ], ids=str)  # fmt: skip
    def test_every_way_to_train_learns(self, make_config, changes):
        records = list(train(MODEL, make_config(max_steps=40, **changes), "variant"))
        assert records[-1].validation_loss < 0.85 * records[0].train_loss

    def test_the_same_seed_gives_the_same_run_and_another_does_not(self, make_config):
        model = replace(MODEL, dropout=0.1)
        for name in ("one", "other"):
            list(train(model, make_config(), name))
        assert_same("one", "other")
        list(train(model, make_config(seed=1), "third"))
        assert not equal(state("one")["model"], state("third")["model"])

    def test_micro_batches_give_the_gradients_of_the_whole_batch(self, make_config):
        """With a huge eps and no momentum yet AdamW's step is the gradient; rows of padding differ in their tokens."""
        linear = {
            "eps": 1.0, "lr_max": 1.0, "weight_decay": 0.0, "grad_clip": None, "schedule": "constant", "warmup_steps": 0,
            "max_steps": 1, "packing": "padded",
        }  # fmt: skip
        records = {}
        for size in (None, 2, 1):
            (records[size],) = train(MODEL, make_config(micro_batch_size=size, **linear), f"by_{size}")
        whole = state("by_None")["model"]
        for size in (1, 2):
            for name, weight in state(f"by_{size}")["model"].items():
                torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-6)
            assert records[size].train_loss == pytest.approx(records[None].train_loss, rel=1e-5)
            assert records[size].tokens == records[None].tokens

    def test_the_first_loss_is_that_of_the_first_batch(self, make_config):
        """A slow reference: each story of a row on its own, each target that tells its own story counted once."""
        config = make_config(max_steps=1, warmup_steps=0)
        record = next(iter(train(MODEL, config, "first")))
        tokenizer = load_tokenizer(config.tokenizer)
        torch.manual_seed(config.seed)
        model = GPT(MODEL, tokenizer.vocab_size)
        rows = load_data(config.data, tokenizer, MODEL.max_seq_len).rows(0, config.batch_size, config.seed)
        nats = []
        for row in rows.tolist():
            while row and row[0] != tokenizer.pad_id:
                end = row.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in row else len(row)
                story, row = [token for token in row[:end] if token != tokenizer.pad_id], row[end:]
                if len(story) > 1:
                    log_probs = model(torch.tensor([story[:-1]]))[0][0].log_softmax(dim=-1)
                    nats += [-log_probs[at, target].item() for at, target in enumerate(story[1:])]
        assert record.tokens == len(nats)
        assert record.train_loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)


class FakeClock:
    """A clock on which a second passes whenever it is read, so that every step takes one."""

    now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


class TestBudget:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = FakeClock()
        monkeypatch.setattr(stopwatch, "perf_counter", clock)
        return clock

    def test_minutes_count_training_and_the_rest_is_overhead(self, make_config, clock, monkeypatch):
        """Neither the caller nor evaluations nor saving shorten a run, and its schedule is that of as many steps."""
        score = checkpoint.evaluate

        def slow_evaluate(*arguments):
            clock.now += 1000
            return score(*arguments)

        monkeypatch.setattr(checkpoint, "evaluate", slow_evaluate)
        records = []
        for record in train(MODEL, make_config(max_steps=None, max_minutes=0.3), "minutes"):
            clock.now += 100  # a plot
            records.append(record)
        assert [record.seconds for record in records] == list(range(1, 19)) and records[-1].validation_loss is not None
        assert records[-1].overhead_seconds > 17 * 100 + 2 * 1000
        assert records[-1].seconds + records[-1].overhead_seconds <= clock.now
        by_steps = list(train(MODEL, make_config(max_steps=18), "steps"))
        for record, other in zip(records, by_steps, strict=True):
            assert (record.train_loss, record.learning_rate) == pytest.approx((other.train_loss, other.learning_rate))

    def test_compiling_in_a_step_is_overhead(self, make_config, clock, monkeypatch):
        def slow_compiler(graph, inputs):
            clock.now += 1000
            return graph.forward

        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=slow_compiler))
        torch._dynamo.reset()
        records = list(train(MODEL, make_config(compile=True, max_steps=3), "compiled"))
        assert records[-1].seconds < 20 and records[-1].overhead_seconds > 1000

    def test_a_resumed_run_goes_on_with_both_counts(self, make_config, clock):
        before = take(9, train(MODEL, make_config(max_steps=None, max_minutes=0.3), "resumed"))[-1]
        clock.now += 10**6  # while it was stopped
        after = list(train(MODEL, make_config(max_steps=None, max_minutes=0.3), "resumed", resume=True))
        assert [record.seconds for record in after] == list(range(10, 19))
        assert before.overhead_seconds < after[0].overhead_seconds < 1000
        assert not Run("resumed").seconds_include_overhead()

    def test_a_run_of_few_steps_says_so(self, make_config, capsys):
        cure = "only 3 steps, too few to learn much: raise --train.max_minutes or --train.max_steps"
        list(train(MODEL, make_config(max_steps=3), "few"))
        assert cure in capsys.readouterr().err
        list(train(MODEL, make_config(max_steps=50, eval_every=50), "enough"))
        assert "too few" not in capsys.readouterr().err

    def test_whichever_comes_first(self, make_config):
        assert len(list(train(MODEL, make_config(max_steps=5, max_minutes=60.0), "steps"))) == 5
        records = list(train(MODEL, make_config(max_steps=10**6, max_minutes=0.005, warmup_steps=0), "minutes"))
        assert len(records) < 10**6 and records[0].learning_rate == make_config().lr_max


class TestLog:
    def test_the_log_is_plain_csv_with_the_fields_of_a_record(self, tiny_run, folders):
        log = pd.read_csv(folders / "runs" / tiny_run / "log_data.csv")
        assert list(log) == COLUMNS == [
            "step", "tokens", "seconds", "train_loss", "validation_loss", "perplexity", "bits_per_byte", "learning_rate",
            "gradient_norm", "tokens_per_second", "peak_memory_mb", "flops", "overhead_seconds",
        ]  # fmt: skip
        assert log["step"].tolist() == [10, 20]
        assert all(kind.kind in "if" for kind in log.dtypes)

    def test_a_row_stands_for_its_steps(self, make_config):
        records = list(train(MODEL, make_config(max_steps=25, eval_every=15), "rows"))
        log = Run("rows").log()
        assert log["step"].tolist() == [10, 15, 20, 25]
        assert log["validation_loss"].isna().tolist() == [True, False, True, False]
        for begin, end, loss in zip([0, 10, 15, 20], log["step"], log["train_loss"], strict=True):
            assert loss == pytest.approx(sum(record.train_loss for record in records[begin:end]) / (end - begin))
        last = asdict(records[-1])
        for column in ("tokens", "validation_loss", "bits_per_byte", "learning_rate", "gradient_norm", "seconds"):
            assert log[column].iloc[-1] == last[column]

    def test_records_add_up(self, make_config):
        records = list(train(MODEL, make_config(), "sums"))
        assert [record.step for record in records] == list(range(1, 21))
        for before, after in itertools.pairwise(records):
            assert after.tokens > before.tokens and after.seconds > before.seconds
            assert after.peak_memory_mb >= before.peak_memory_mb > 1
        for record in records:
            if record.validation_loss is not None:
                assert record.perplexity == pytest.approx(torch.tensor(record.validation_loss, dtype=torch.float64).exp().item())

    def test_validation_always_reads_the_same_stories(self, make_config, monkeypatch):
        read = []

        def spy(model, tokenizer, stories, **options):
            read.append(stories)
            return evaluate(model, tokenizer, stories, **options)

        monkeypatch.setattr(checkpoint, "evaluate", spy)
        list(train(MODEL, make_config(), "one"))
        list(train(replace(MODEL, dim=8, max_seq_len=16), make_config(seed=3, tokenizer="bpe_tokenizer_256"), "other"))
        whole = [stories for stories in read if len(stories) >= 200]
        assert len(whole) == 4 and all(stories == whole[0] for stories in whole)


class TestSamples:
    def test_every_evaluation_writes_a_story(self, make_config, monkeypatch):
        records = list(train(MODEL, make_config(), "mine"))
        written = [(record.step, record.tokens, record.story) for record in records if record.story is not None]
        samples = pd.read_csv(Run("mine").path("samples.csv"), keep_default_na=False)
        assert list(samples) == ["step", "tokens", "bits_per_byte", "story"] and samples["step"].tolist() == [10, 20]
        assert list(samples.drop(columns="bits_per_byte").itertuples(index=False, name=None)) == written
        assert records[-1].story == generate(*load_model("mine"), "", temperature=0)

    def test_it_uses_no_training_time_and_no_random_numbers(self, make_config, monkeypatch):
        changes = []

        def spy(*arguments, **options):
            before = torch.get_rng_state()
            story = generate(*arguments, **options)
            changes.append(not torch.equal(before, torch.get_rng_state()))
            time.sleep(0.2)
            return story

        monkeypatch.setattr(checkpoint, "generate", spy)
        last = list(train(replace(MODEL, dropout=0.1), make_config(max_steps=4, eval_every=2), "mine"))[-1]
        assert changes == [False, False] and last.overhead_seconds > 0.4
        assert last.seconds < last.overhead_seconds

    def test_a_resumed_run_goes_on_with_the_same_file(self, make_config):
        take(7, train(MODEL, make_config(eval_every=5), "stopped"))
        list(train(MODEL, make_config(eval_every=5), "stopped", resume=True))
        list(train(MODEL, make_config(eval_every=5), "whole"))
        assert Run("stopped").path("samples.csv").read_text() == Run("whole").path("samples.csv").read_text()


class TestCheckpoints:
    def test_last_and_best_are_kept(self, make_config):
        """The second half of the run spoils the model, so that the last weights are not the best."""
        spoiling = {"schedule": "constant", "warmup_steps": 30, "lr_init": 0.0, "lr_max": 20.0, "max_steps": 30, "eval_every": 1}
        records = list(train(MODEL, make_config(**spoiling), "spoilt"))
        best = min(records, key=lambda record: record.validation_loss)
        assert best.step < 30
        saved = Run("spoilt").load("model.pth", {"model", "step", "loss"})
        assert (saved["step"], saved["loss"]) == (best.step, best.validation_loss)
        model, tokenizer = load_model("spoilt")
        data = load_data(make_config().data, tokenizer, MODEL.max_seq_len)
        assert evaluate(model, tokenizer, data.validation[:200]).loss == best.validation_loss
        assert state("spoilt")["step"] == 30

    def test_break_saves_where_it_stops(self, make_config):
        for record in train(MODEL, make_config(), "left"):
            if record.step == 5:
                break
        assert state("left")["step"] == 5
        assert list(Run("left").log()) == COLUMNS
        list(train(MODEL, make_config(), "left", resume=True))
        list(train(MODEL, make_config(), "whole"))
        assert_same("left", "whole")

    @pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM] * 2, [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM]])
    def test_a_signal_while_a_record_is_looked_at_saves_too(self, make_config, numbers):
        records, before = [], [signal.getsignal(number) for number in STOP_SIGNALS]
        for record in train(MODEL, make_config(), "looked"):
            records.append(record)
            if record.step == 3:
                for number in numbers:
                    signal.raise_signal(number)
        assert records[-1].step == 3 and state("looked")["step"] == 3
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before

    def test_a_hangup_that_nohup_ignores_is_ignored(self, make_config):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            for _ in train(MODEL, make_config(max_steps=3), "nohup"):
                signal.raise_signal(signal.SIGHUP)
            assert state("nohup")["step"] == 3 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_generator_with_a_name_is_saved_when_it_is_closed(self, make_config):
        records = train(MODEL, make_config(), "named")
        for record in records:
            if record.step == 3:
                break
        assert state("named")["step"] == 0
        with pytest.raises(ValueError, match=r"training the run 'named' already: .*records\.close\(\)"):
            next(train(MODEL, make_config(), "named", resume=True))
        records.close()
        assert state("named")["step"] == 3

    def test_a_model_can_be_read_before_the_first_validation(self, make_config):
        take(1, train(MODEL, make_config(), "young"))
        load_model("young")
        assert plot_losses("young").get_legend_handles_labels()[1]

    def test_what_is_finished_cannot_be_resumed(self, tiny_run, make_config):
        with pytest.raises(ValueError, match=r"finished after 20 steps.*--continue_from tiny"):
            next(train(MODEL, make_config(), tiny_run, resume=True))

    def test_changed_data_are_refused(self, make_config, tmp_path, stories):
        path = tmp_path / "mine.txt"
        path.write_text("\n\n".join(stories), encoding="utf-8")
        config = make_config(data=str(path))
        take(3, train(MODEL, config, "mine"))
        path.write_text("\n\n".join(stories[:450]), encoding="utf-8")
        with pytest.raises(ValueError, match="the data of the run 'mine' have changed"):
            next(train(MODEL, config, "mine", resume=True))

    def test_the_log_of_a_run_is_not_replaced_by_half_of_it(self, make_config):
        take(12, train(MODEL, make_config(), "half"))
        (Run("half").folder / "log_data.csv").write_bytes(b"")
        with pytest.raises(ValueError, match=r"log_data\.csv of the run 'half' is damaged"):
            next(train(MODEL, make_config(), "half", resume=True))


RECURRENT = ("Norm->Mamba->+", "Norm->Mamba2->+", "Norm->RGLRU->+", "Norm->GatedDeltaNet->+", "Megalodon(chunk=16)->+")
VARIANTS = {
    "plain": (MODEL, {}),
    "dropout": (replace(MODEL, dropout=0.2), {}),
    "micro_batches": (replace(MODEL, dropout=0.2), {"micro_batch_size": 2}),
    "muon": (MODEL, {"optimizer": "Muon"}),
    "compiled": (MODEL, {"compile": True, "mask_stories": False, "window_start": 16}),
    "kernels": (MODEL, {"fast": True}),
    "growing_and_averaged": (MODEL, {"batch_size_start": 1, "window_start": 16, "ema_decay": 0.9}),
    "less_memory": (replace(MODEL, dropout=0.2), {"gradient_checkpointing": True, "loss_chunk": None}),
    "recurrent": (replace(MODEL, num_layers=5, layers=RECURRENT), {}),
    "restarts": (replace(MODEL, tied_embeddings=False), {"schedule": "cosine", "num_restarts": 2, "mask_stories": True}),
}

TRAIN_PY = "runpy.run_path('train.py', run_name='__main__')"

KILLED = """
import functools, json, sys
from torch import nn
from config import ModelConfig, TrainConfig, from_json
from train import train
nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
generators = []
for name, model, config in json.loads(sys.argv[1]):
    generators.append(train(from_json(ModelConfig, model), from_json(TrainConfig, config), name))
    for step in range(11):
        next(generators[-1])
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def killed(make_config, tmp_path_factory):
    """The variants after a process that was killed at step 11, each with a checkpoint of step 8.

    What is compiled was traced, but not by the C++ compiler, and the kernels are those that this process has.
    """
    folder = tmp_path_factory.mktemp("killed")
    jobs = [(name, to_json(model), to_json(make_config(**changes))) for name, (model, changes) in VARIANTS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASEGPT_RUNS", str(folder / "runs"))
        patch.setenv("BASEGPT_CACHE", str(folder / "cache"))
        (folder / "cache").mkdir()
        kernels = Path(build.build()._name)
        if kernels.parent != folder / "cache":
            shutil.copy(kernels, folder / "cache")
        words = [sys.executable, "-c", KILLED, json.dumps(jobs)]
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    process.kill()
    process.communicate()
    return folder


class TestResume:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_eight_steps_a_kill_and_twelve_more_are_twenty(self, killed, variant, make_config, monkeypatch):
        monkeypatch.setenv("BASEGPT_RUNS", str(killed / "runs"))
        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
        model, changes = VARIANTS[variant]
        config = make_config(**changes)
        assert state(variant)["step"] == 8
        resumed = list(train(model, config, variant, resume=True))
        assert [record.step for record in resumed] == list(range(9, 21))
        whole = list(train(model, config, f"{variant}_whole"))
        assert losses(resumed) == losses(whole[8:])
        assert_same(variant, f"{variant}_whole")

    def test_ctrl_c_in_the_terminal_then_resume(self, make_config, script, tmp_path):
        model = replace(MODEL, layers="Norm->Attn->+->Norm->MLP->+->Held->+", plugins=("held_blocks",))
        config, held = make_config(), tmp_path / "held"
        held.mkdir()
        process = subprocess.Popen(
            [sys.executable, "train.py", *words_of(config, "interrupted", model)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"HELD": str(held), "PYTHONPATH": str(Path(__file__).parent)},
        )  # fmt: skip
        while process.poll() is None and not any(held.iterdir()):  # step 4 waits for Ctrl-C
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert process.returncode == 0 and "Traceback" not in err, err
        assert state("interrupted")["step"] == 4
        assert "stopped after 4 steps and saved" in out
        assert "python train.py --name interrupted --resume" in out

        code, printed = script("--name", "interrupted", "--resume")
        assert code == 0 and "bits per byte after 20 steps" in printed, printed
        list(train(model, config, "uninterrupted"))
        assert_same("interrupted", "uninterrupted")

    def test_the_terminal_refuses_other_options(self, make_config, script):
        take(2, train(MODEL, make_config(), "mine"))
        for words in (["--train.lr_max", "0.5"], ["--model.dim", "32"], ["--preset", "1m"]):
            code, printed = script("--name", "mine", "--resume", *words)
            assert code != 0 and "leave" in printed and "Traceback" not in printed
        code, printed = script("--resume")
        assert code == 2 and printed.strip() == "error: --resume needs the name of the run to go on with: add --name"

    @pytest.mark.parametrize("file, content", [
        ("checkpoint.pth", None), ("checkpoint.pth", b"no"), ("log_data.csv", None), ("train_config.json", b"{"),
        ("model_config.json", None),
    ])  # fmt: skip
    def test_a_damaged_run_is_named_in_one_line(self, make_config, script, file, content):
        take(2, train(MODEL, make_config(), "mine"))
        path = Run("mine").folder / file
        path.unlink() if content is None else path.write_bytes(content)
        code, printed = script("--name", "mine", "--resume")
        error = printed.strip().splitlines()[-1]
        assert code == 1 and error.startswith("error: ") and file in error and "'mine'" in error

    def test_the_checkpoint_of_another_architecture_is_named(self, make_config):
        for name, model in (("mine", MODEL), ("other", replace(MODEL, dim=8))):
            take(2, train(model, make_config(), name))
        Run("mine").save("checkpoint.pth", Run("other").load("checkpoint.pth", CHECKPOINT))
        with pytest.raises(ValueError, match=r"checkpoint\.pth of the run 'mine' does not fit"):
            next(train(MODEL, make_config(), "mine", resume=True))


class TestContinueFrom:
    def test_begins_with_the_best_weights_and_a_new_config(self, tiny_run, make_config):
        config = make_config(max_steps=10, lr_max=1e-9, lr_init=0.0, batch_size=2, seed=5)
        records = list(train(MODEL, config, "further", continue_from=tiny_run))
        old = Run(tiny_run).load("model.pth", {"loss"})["loss"]
        assert records[0].step == 1
        assert records[-1].validation_loss == pytest.approx(old, rel=1e-5)
        assert Run("further").train_config == config

    def test_another_tokenizer_or_architecture_is_refused(self, tiny_run, make_config):
        with pytest.raises(ValueError, match=r"another tokenizer: give --train\.tokenizer bpe_tokenizer_128"):
            next(train(MODEL, make_config(tokenizer="bpe_tokenizer_256"), "further", continue_from=tiny_run))
        with pytest.raises(ValueError, match="another architecture"):
            next(train(replace(MODEL, num_layers=2), make_config(), "further", continue_from=tiny_run))
        with pytest.raises(FileNotFoundError, match=r"no run is called 'tinny'\. Did you mean 'tiny'"):
            next(train(MODEL, make_config(), "further", continue_from="tinny"))
        assert not Run("further").folder.exists()

    def test_the_old_run_gives_model_and_tokenizer(self, tiny_run, make_config, corpus):
        arguments = parse(["--continue_from", tiny_run, "--train.data", corpus])
        assert arguments.model == MODEL
        assert arguments.train == TrainConfig(data=corpus, tokenizer="bpe_tokenizer_128")
        with pytest.raises(ValueError, match="leave --preset out"):
            parse(["--continue_from", tiny_run, "--preset", "5m"])


POISON = """
import torch
from torch import nn
from torch import nn

class Poison(nn.Module):
    '''Turns into infinity behind the 13th step of training.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x):
        x = x + self.shift
        if self.training:
            self.steps += 1
            self.shift = torch.where(self.steps >= 13, torch.inf, 0.0)
        return x

BLOCKS = {"Poison": Poison}
"""


class TestDivergence:
    @pytest.fixture
    def poisoned(self, tmp_path, monkeypatch):
        (tmp_path / "poisoned_blocks.py").write_text(POISON, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "poisoned_blocks", raising=False)
        return replace(MODEL, layers="Norm->Attn->+->Poison", plugins=("poisoned_blocks",))

    def test_a_loss_that_is_not_finite_stops_the_run(self, poisoned, make_config):
        with pytest.raises(FloatingPointError, match=r"step 14, with a learning rate of 0\.00\d+\. Lower --train\.lr_max.*'bad'"):
            list(train(poisoned, make_config(), "bad"))
        assert state("bad")["step"] == 8
        load_model("bad")

    def test_broken_weights_never_replace_a_good_checkpoint(self, poisoned, make_config):
        """The loss of step 13 is still finite; the weights behind it are not."""
        with pytest.raises(FloatingPointError, match="step 13"):
            list(train(poisoned, make_config(checkpoint_every=1), "bad"))
        assert state("bad")["step"] == 12
        assert state("bad")["model"]["layers.0.branches.0.blocks.2.shift"] == 0

    def test_a_run_that_ends_broken_says_so(self, poisoned, make_config):
        with pytest.raises(FloatingPointError, match="step 13"):
            list(train(poisoned, make_config(max_steps=13), "bad"))
        assert state("bad")["step"] == 8

    def test_far_too_high_a_learning_rate(self, make_config, script):
        config = make_config(lr_max=1e38, warmup_steps=0, checkpoint_every=1, grad_clip=None)
        code, printed = script(*words_of(config, "hot"))
        error = printed.strip().splitlines()[-1]
        assert code == 1 and "Traceback" not in printed
        wanted = r"error: the loss is no longer finite at step \d+, with a learning rate of 1e\+38\. Lower --train\.lr_max"
        assert re.match(wanted, error)


class TestData:
    def test_without_a_network_auto_is_storyworld(self, make_config, capsys, monkeypatch):
        """And says so."""
        monkeypatch.setattr(dataset, "MAX_VALIDATION", 200)
        config = make_config(data="auto", max_stories=200, tokenizer="bpe_tokenizer_256")
        list(train(MODEL, config, "offline"))
        assert "using storyworld_small instead" in capsys.readouterr().err
        run = Run("offline")
        assert run.train_config == replace(config, data="storyworld_small")
        assert run.load("model.pth", {"data"})["data"] == "storyworld_small"
        write_report("offline")
        assert "trained on storyworld_small" in (run.folder / "README.md").read_text(encoding="utf-8")
        assert plot_losses("offline").get_legend_handles_labels()[1][0] == "offline on storyworld_small"

    @pytest.mark.parametrize("data", ["tinystories", "hub:nobody/nothing"])
    def test_data_asked_for_by_name_never_fall_back(self, make_config, script, data):
        code, printed = script(*words_of(make_config(data=data), "online"))
        error = printed.strip().splitlines()[-1]
        assert code == 1 and error.startswith("error: ") and "can't be reached" in error and "--train.data" in error
        assert not Run("online").folder.exists()


class TestMachine:
    @pytest.mark.parametrize("compiler", [{"CXX": "no-such-compiler"}, {"PATH": "", "CXX": ""}], ids=["CXX", "PATH"])
    def test_compile_without_a_compiler(self, make_config, monkeypatch, compiler):
        for name, value in compiler.items():
            monkeypatch.setenv(name, value)
        wanted = r"compile=True needs the C\+\+ compiler '[^']+', which is not here: .* leave compile off"
        with pytest.raises(ValueError, match=wanted):
            next(train(MODEL, make_config(compile=True), "compiled"))
        assert not Run("compiled").folder.exists()

    def test_a_limit_of_memory_that_is_too_tight_for_any_training(self):
        code = "import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9)); "
        run = subprocess.run([sys.executable, "-c", code + TRAIN_PY], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 1 and run.stderr.startswith("error: this process may take 954 MB (ulimit -v), but")
        assert run.stderr.count("\n") == 1

    def test_a_block_that_cannot_be_run_is_one_line_and_leaves_no_run(self, make_config, monkeypatch):
        monkeypatch.setattr(MLP, "forward", lambda block, x: block.w_out(x[..., 1:]))
        with pytest.raises(ValueError, match=r"it fails in its block 'MLP': RuntimeError: mat1 and mat2.*, line \d+") as error:
            next(train(replace(MODEL, plugins=("own_models",)), make_config(), "broken"))
        assert "\n" not in str(error.value) and not Run("broken").folder.exists()

    def test_a_model_larger_than_memory_leaves_no_run(self, make_config, monkeypatch):
        def too_large(config, vocab_size, tokenizer):
            return torch.empty(2**60)

        monkeypatch.setattr(setup, "build_model", too_large)
        with pytest.raises(MemoryError, match=r"weights do not fit into the [0-9,]+ MB that are free: take"):
            next(train(MODEL, make_config(), "large"))
        assert not Run("large").folder.exists()

    def test_five_million_parameters_at_512_tokens_train_within_2_gb(self, make_config):
        code = (
            "import sys; from config import ModelConfig, TrainConfig, from_json; from train import train; "
            "configs = from_json(ModelConfig, sys.argv[1]), from_json(TrainConfig, sys.argv[2]); "
            "print(max(record.peak_memory_mb for record in train(*configs, 'large')))"
        )
        model = replace(PRESETS["5m"].model, max_seq_len=512)
        config = make_config(max_steps=2, warmup_steps=0, tokenizer="bpe_tokenizer_1024")
        shown = subprocess.check_output([sys.executable, "-c", code, to_json(model), to_json(config)], cwd=ROOT)
        assert float(shown) < 2048

    @pytest.mark.parametrize("device", ["cuda:99", "toaster"])
    def test_a_device_that_is_not_there(self, make_config, device):
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used here .*: take --train.device cpu") as error:
            next(train(MODEL, make_config(device=device), "elsewhere"))
        assert "\n" not in str(error.value)
        assert not Run("elsewhere").folder.exists()


class TestTerminal:
    @pytest.mark.parametrize("name", PRESETS)
    def test_a_preset_is_what_is_trained(self, name):
        assert (parse(["--preset", name]).model, parse(["--preset", name]).train) == preset(name)

    def test_default_names_are_safe_everywhere(self):
        for name in (*PRESETS, "my_run"):
            assert re.fullmatch(r"[\w.-]+", Run(default_name(name)).name)

    def test_options_change_the_preset(self):
        arguments = parse(shlex.split("--preset 2m --model.dropout 0.1 --train.max_minutes 10 --train.data some/folder --name x"))
        assert arguments.model == replace(preset("2m").model, dropout=0.1)
        assert arguments.train == TrainConfig(max_minutes=10.0, data="some/folder")

    @pytest.mark.parametrize("words, wanted", [
        ("--preset 0.5m_short_and_thik", "no preset is called '0.5m_short_and_thik'. Did you mean '0.5m_short_and_thick'?"),
        ("--train.lr_maxx 1", "--train.lr_maxx"),
        ("--preset 0.5m_short_and_thick --model.num_heads 3", "it must divide num_heads=3"),
        ("--model.dim twelve", "twelve"),
        ("--train.schedule cosin", "no schedule is called 'cosin'. Did you mean 'cosine'?"),
        ("--train.optimizer adamw", "no optimizer is called 'adamw'. Did you mean 'AdamW'?"),
        ("--train.loss cross_entrpy", "no loss is called 'cross_entrpy'. Did you mean 'cross_entropy'?"),
        ("--train.optimizer AdamW(beta=(0.9,0.9))", "AdamW has no option 'beta'. Did you mean 'betas'?"),
        ("--train.optimizer AdamW(lr=0.1)", "parameter groups set lr: give --train.lr_max instead"),
        ("--train.batch_size 0", "batch_size=0: give a whole number of at least 1"),
        ("--name a/b/c", "'a/b/c' cannot be a run's name"),
        ("--name tiny", "a run called 'tiny' exists. Take another --name, or go on with it by --resume"),
        ("--name nobody --resume", "no run is called 'nobody'"),
        ("--continue_from nobody", "no run is called 'nobody'"),
        ("--model.layers Norm->Atn->+", "no block is called 'Atn'. Did you mean 'Attn'?"),
        ("--model.layers Norm->Attn(windw=3)->+", "Attn has no option 'windw'"),
        ('--model.layers "(Norm"', "'(Norm' cannot be read"),
        ("--model.plugins no_such_module", "No module named 'no_such_module'"),
        ("--train.tokenizer bpe_tokenizer_1023", "no tokenizer is called 'bpe_tokenizer_1023'"),
        ("--train.data no/such/file.txt", "no/such/file.txt"),
        ("--train.device toaster", "device='toaster'"),
    ])  # fmt: skip
    def test_a_mistake_is_named(self, script, tiny_run, words, wanted, corpus):
        words = shlex.split(words)
        data = [] if "--train.data" in words or "--resume" in words else ["--train.data", corpus]
        code, printed = script(*words, *data)
        assert code != 0 and "Traceback" not in printed
        assert wanted in plain(printed)

    def test_help_needs_no_torch(self):
        code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        shown = subprocess.check_output([sys.executable, "-c", code + TRAIN_PY, "--help"], cwd=ROOT, text=True)
        assert shown.splitlines()[-1] == "False" and "--train.lr_max" in shown

    def test_help_explains_the_knobs(self, script):
        code, printed = script("--help_all")
        assert code == 0
        for said in ("width of the residual stream", "learning rate before the warm-up", "go on with the stopped run --name"):
            assert said in plain(printed)

    def test_a_new_python_ends_with_an_exit_code_and_one_line(self):
        """What `script` cannot see: the exit code of the process, and that nothing but the message is printed."""
        done = subprocess.run(
            [sys.executable, "train.py", "--preset", "6m"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"error: no preset is called '6m'\. .*\n", done.stderr)

    def test_a_run_from_the_terminal_ends_with_stories(self, make_config, script):
        code, printed = script(*words_of(make_config(max_steps=5), "mine"))
        assert code == 0 and re.search(r"after 5 steps: \d+\.\d minutes of training, \d+\.\d minutes of preparing", printed)
        said_last = 'python inference.py mine "Once upon a time"'
        for said in ("loss.png", said_last, "model_evaluation.ipynb"):
            assert said in printed
        stories = Stories({f"Story {number + 1}": story for number, story in enumerate(generate(*load_model("mine"), [""] * 3))})
        assert str(stories) in printed and "step 5, " in printed
        present = {path.name for path in Run("mine").folder.iterdir()}
        assert present == {
            "README.md", "model_config.json", "train_config.json", "execution.json", "log_data.csv", "model.pth",
            "checkpoint.pth", "loss.png", "samples.csv", "story_losses.csv", "story_losses.json", "tokenizer.json", "digests.txt",
        }  # fmt: skip
