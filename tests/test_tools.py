import inspect
import io
import linecache
import re
import sys
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import ModelConfig
from model import GPT, Cache
from shapes.comments import ShapeComments
from tools import LoggingModule, show_shapes

B, T, DIM = 2, 5, 12


def halve(x):
    return x.chunk(2, dim=-1)[0]


class Attend(LoggingModule):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.w_q = nn.Linear(DIM, self.num_heads * self.head_dim, bias=False)

    def forward(self, x, *, bias=None):
        B, T, D = x.shape
        q = self.w_q(x).view(
            B, T,  # a statement of several lines
            self.num_heads, self.head_dim,
        )  # (B, T, num_heads, head_dim)
        q = q.transpose(1, 2)  # (B, num_heads, T, head_dim) heads first
        scores = q @ q.transpose(2, 3)  # (B, num_heads, T, T)
        if bias is not None:
            scores += bias
        halves = halve(q)
        with torch.enable_grad():
            return (scores @ q).transpose(1, 2).reshape(B, T, self.num_heads * self.head_dim) + 0 * halves.sum()  # (B, T, D)


class Layer(LoggingModule):
    def __init__(self):
        super().__init__()
        self.norm, self.attend = nn.RMSNorm(DIM), Attend()

    def forward(self, x, **needs):
        x = x + self.attend(self.norm(x), **needs)
        return x


class Model(LoggingModule):
    def __init__(self, num_layers=8, layer=Layer):
        super().__init__()
        self.embedding = nn.Embedding(11, DIM)
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        self.head = nn.Linear(DIM, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def shown(capsys, model, *inputs, **options):
    with show_shapes(model, **options):
        model(*inputs)
    return capsys.readouterr().out


def row(text, part):
    """The one row that has `part` in it, its columns split."""
    found = [line for line in text.splitlines() if part in line]
    assert len(found) == 1, f"{len(found)} rows with {part!r} in\n{text}"
    return [column.strip(" │├└─") for column in found[0].split("  ") if column.strip(" │├└─")]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")


@pytest.fixture
def tokens():
    return torch.arange(B * T).view(B, T)


def has_hooks(model):
    return any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in model.modules())


def test_names_classes_shapes_dtypes_and_parameters_of_the_nested_modules(capsys, tokens):
    text = shown(capsys, Model(num_layers=1), tokens)
    assert row(text, "Model") == ["Model", "(2, 5) int64 → (2, 5, 11)", str(11 * DIM + DIM + DIM * DIM)]
    assert row(text, "w_q  Linear") == ["w_q", "Linear", "(2, 5, 12) → (2, 5, 12)", "144"]
    names = ["embedding", "layers.0", "norm", "attend", "w_q", "head"]
    starts = [next(i for i, line in enumerate(text.splitlines()) if f"─ {name} " in line) for name in names]
    assert starts == sorted(starts)


def test_lines_inside_forward_come_with_their_source_and_the_letters_of_their_shape(capsys):
    text = shown(capsys, Attend(), torch.randn(B, T, DIM))
    assert row(text, "B, T, D = x.shape")[1] == "B 2, T 5, D 12"
    assert row(text, "q = self.w_q(x)") == [
        "q = self.w_q(x).view(B, T, self.num_heads, self.head_dim)", "q (2, 5, 3, 4) = (B, T, num_heads, head_dim)"]
    assert row(text, "q = q.transpose(1, 2)")[1] == "q (2, 3, 5, 4) = (B, num_heads, T, head_dim)"
    assert row(text, "return x.chunk(2, dim=-1)[0]")[1] == "return (2, 3, 5, 2)"
    assert row(text, "halve()")[1] == "(2, 3, 5, 4) → (2, 3, 5, 2)"
    assert row(text, "return (2, 5, 12)") == ["return (2, 5, 12) = (B, T, D)"]  # below its line
    assert "view" not in shown(capsys, Attend(), torch.randn(B, T, DIM), lines=False)


def test_in_place_changes_and_containers_are_seen(capsys):
    class Block(LoggingModule):
        def forward(self, x, *, cache):
            x += 1
            x.mul_(2)
            cache["k"] = x[:1]
            self.kept, pair = x[0], [x, x[0]]
            return {"x": x, "pair": pair}

    with show_shapes(block := Block()):
        block(torch.zeros(2, 3), cache={"old": torch.zeros(7)})
    text = capsys.readouterr().out
    assert row(text, "given")[1] == "cache['old'] (7,)"
    assert row(text, "x += 1")[1] == row(text, "x.mul_(2)")[1] == "x (2, 3)"
    assert row(text, 'cache["k"]')[1] == "cache['old'] (7,), cache['k'] (1, 3)"
    assert row(text, "self.kept")[1] == "self.kept (3,), pair[0] (2, 3), pair[1] (3,)"
    assert row(text, "return {")[1] == "return['x'] (2, 3), return['pair'][0] (2, 3), return['pair'][1] (3,)"


def test_equal_layers_are_folded_and_different_ones_are_not(capsys, tokens):
    text = shown(capsys, Model(), tokens)
    assert row(text, "Layer") == ["layers.0–7", "Layer × 8", "(2, 5, 12) → (2, 5, 12)", "8 × 156"]
    assert row(text, "x = layer(x)")[0] == "x = layer(x) × 8"
    model = Model(num_layers=5)
    model.layers[2] = nn.Linear(DIM, DIM)
    text = shown(capsys, model, tokens)
    assert [row(text, name)[0] for name in ("layers.0–1", "layers.2", "layers.3–4")] == ["layers.0–1", "layers.2", "layers.3–4"]


def test_calls_of_a_module_with_a_space_in_its_name_are_folded(capsys):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.arms = nn.ModuleDict({"left, 1 of 2": nn.Linear(3, 3)})

        def forward(self, x):
            for arm in [self.arms["left, 1 of 2"]] * 2:
                x = arm(x)
            return x

    assert "arms.left, 1 of 2  Linear × 2" in shown(capsys, Twice(), torch.ones(2, 3))


def test_a_tile_of_layers_is_folded_over_the_depth(capsys, tokens):
    model = Model(num_layers=6)
    model.layers[2], model.layers[5] = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
    text = shown(capsys, model, tokens)
    assert row(text, "Layer")[:2] == ["layers.0–1, 3–4", "Layer × 4"]
    assert row(text, "layers.2, 5")[:2] == ["layers.2, 5", "Linear × 2"]


def test_tied_weights_and_modules_called_twice_count_once(capsys, tokens):
    text = shown(capsys, Model(num_layers=1), tokens)
    assert row(text, "embedding  Embedding")[-1] == "132"
    assert row(text, "head  Linear")[-1] == "132 shared"
    model = Model(num_layers=3)
    model.layers[1] = model.layers[2] = model.layers[0]
    text = shown(capsys, model, tokens)
    assert row(text, "Layer") == ["layers.0", "Layer × 3", "(2, 5, 12) → (2, 5, 12)", "156"]
    assert row(text, "Model")[-1] == str(sum(p.numel() for p in model.parameters()))


def test_values_and_whole_tensors(capsys):
    x = torch.tensor([[1.0, 2.0, 6.0]])
    text = shown(capsys, nn.Identity(), x, values=True, tensors=True)
    assert "min 1         mean 3         max 6" in text and "tensor([[1., 2., 6.]])" in text
    text = shown(capsys, nn.Identity(), torch.zeros(13, 5), tensors=True)
    assert "65 numbers: too many to print" in text and "tensor(" not in text
    kinds = ({}, {"dtype": torch.bool}, {"dtype": torch.complex64}, {"device": "meta"})
    for odd in (torch.zeros(0, 3), *(torch.zeros(2, **kind) for kind in kinds)):
        assert str(tuple(odd.shape)) in shown(capsys, nn.Identity(), odd, values=True, tensors=True)


def test_dtypes_show_where_they_are_not_float32(capsys):
    assert row(shown(capsys, nn.Linear(3, 4).bfloat16(), torch.zeros(2, 3).bfloat16()), "Linear")[1] == (
        "(2, 3) bfloat16 → (2, 4) bfloat16")


def test_show_runs_without_gradients_passes_needs_on_and_returns_the_output(capsys):
    block, x, bias = Attend(), torch.randn(B, T, DIM), torch.randn(T, T)
    output = block.show(x, bias=bias)
    assert torch.equal(output, block(x, bias=bias)) and not output.requires_grad
    assert row(capsys.readouterr().out, "given")[1] == "bias (5, 5)"


def test_a_need_that_is_only_passed_on_is_shown_where_it_is_used(capsys):
    Layer().show(torch.randn(B, T, DIM), bias=torch.randn(T, T))
    lines = capsys.readouterr().out.splitlines()
    given = [i for i, line in enumerate(lines) if "given" in line]
    assert len(given) == 1 and "attend" in lines[given[0] - 1]


def test_showing_changes_no_number_and_no_gradient(tokens):
    model = Model()
    plain = model(tokens)
    plain.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with show_shapes(model, values=True):
        output = model(tokens)
        output.sum().backward()
    assert torch.equal(plain, output)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_off_there_is_no_hook_and_no_trace_function(tokens):
    def debugger(frame, event, argument):
        return None

    model, before = Model(), sys.gettrace()
    sys.settrace(debugger)
    try:
        with show_shapes(model):
            assert has_hooks(model) and sys.gettrace() is not debugger
            model(tokens)
        assert not has_hooks(model) and sys.gettrace() is debugger
        with pytest.raises(IndexError), show_shapes(model):
            model(tokens + 11)
        assert not has_hooks(model) and sys.gettrace() is debugger
    finally:
        sys.settrace(before)


def test_a_logging_module_compiles_into_one_graph_and_is_shown_uncompiled(capsys):
    model, x = Layer(), torch.randn(B, T, DIM)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    assert row(shown(capsys, compiled, x), "w_q  Linear")[-1] == "144"
    assert torch.equal(compiled(x), model(x))


def test_an_exception_goes_on_and_the_trace_leads_to_its_line(capsys):
    with pytest.raises(RuntimeError, match="must match"), show_shapes(model := Layer()):
        model(torch.randn(B, T, DIM), bias=torch.randn(4, 4))
    text = capsys.readouterr().out
    assert row(text, "Layer")[1] == "(2, 5, 12) → ✗"
    assert row(text, "scores += bias")[1] == "✗ scores (2, 3, 5, 5), bias (4, 4)"
    assert len([line for line in text.splitlines() if "✗ RuntimeError" in line]) == 1
    assert "halves" not in text
    with pytest.raises(RuntimeError), show_shapes(model):
        model(torch.randn(B, T, 13))
    assert "(2, 5, 13) → ✗" in capsys.readouterr().out


def test_an_exception_that_the_model_catches_is_no_failure(capsys):
    class Careful(LoggingModule):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Linear(7, 7), nn.Linear(DIM, 6)

        def forward(self, x):
            try:
                y = self.wrong(x)
            except RuntimeError:
                y = self.right(x)
            return y

    text = shown(capsys, Careful(), torch.randn(B, DIM))
    assert row(text, "Careful")[1] == "(2, 12) → (2, 6)"
    assert row(text, "wrong  Linear")[2] == "(2, 12) → ✗"
    assert row(text, "right  Linear")[2] == "(2, 12) → (2, 6)"
    assert row(text, "y = self.right(x)")[1] == "y (2, 6)"


def test_misuse_is_one_clear_line():
    with pytest.raises(RuntimeError, match="the model was not called inside show_shapes"), show_shapes(Layer()):
        pass
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, but got None"), show_shapes(None):
        pass
    with pytest.raises(ValueError, match=r"Layer\.show needs an input tensor"):
        Layer().show(None)


def test_lazy_modules_show_what_they_became(capsys):
    assert row(shown(capsys, nn.LazyLinear(4), torch.zeros(2, 3)), "Linear") == ["Linear", "(2, 3) → (2, 4)", "16"]


def test_a_model_may_call_itself_again_and_keep_its_shape_in_a_loop(capsys):
    class Loop(LoggingModule):
        def forward(self, x, depth=2):
            for _ in range(3):
                x = x * 2
                y = [x] * 2
            if depth:
                return self(x, depth - 1)
            return y[0]

    text = shown(capsys, Loop(), torch.zeros(2, 3))
    assert text.count("x = x * 2 × 3") == text.count("y = [x] * 2 × 3") == 3
    assert text.count("Loop") == 3


def test_classes_of_notebook_cells_and_decorated_forwards(capsys):
    source = """
import torch
from tools import LoggingModule

class Block(LoggingModule):
    @torch.no_grad()
    def forward(self, x):
        rows = [row * 2 for row in x]
        y = torch.stack(rows)  # (2, ...)
        return double(y)
"""
    helper = "def double(y):\n    z = y * 2\n    return z\n"
    cells = {"__name__": "cells"}
    for name, cell in (("cell_1.py", source), ("cell_2.py", helper)):
        linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
        exec(compile(cell, name, "exec"), cells)
    text = shown(capsys, cells["Block"](), torch.ones(2, 3))
    assert row(text, "rows =")[1] == "rows[0] (3,), rows[1] (3,)"
    assert row(text, "y = torch.stack(rows)")[1] == "y (2, 3) = (2, ...)"
    assert row(text, "z = y * 2")[1] == "z (2, 3)"


@pytest.mark.parametrize("columns", [40, 80, 110, 150])
def test_the_trace_fits_the_terminal_and_is_not_cut(capsys, tokens, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, Model(), tokens)
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    for word in ("self.num_heads,", "self.head_dim)", "(1, 2)", "halves.sum()", "num_heads, T, head_dim)", "(2, 3, 5, 4)"):
        assert word in text
    if columns == 40:  # shapes below their line
        squeezed = re.sub(r"[\s│├└─]", "", text)
        assert "q=self.w_q(x).view(B,T,self.num_heads,self.head_dim)q(2,5,3,4)=(B,T,num_heads,head_dim)" in squeezed


def test_colors_are_for_terminals(tokens, monkeypatch):
    terminal, model = io.StringIO(), Model()
    terminal.isatty = lambda: True
    with show_shapes(model, file=terminal):
        model(tokens)
    text = terminal.getvalue()
    assert "\033[1;34mw_q\033[0m  Linear" in text and "\033[36m(2, 5, 12) → (2, 5, 12)\033[0m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    with show_shapes(model, file=terminal):
        model(tokens)
    assert "\033" not in terminal.getvalue()[len(text) :]


class Balance(HTMLParser):
    """Which tags there are. Fails where one is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_notebook_gets_text_and_html_that_reads_without_styles(capsys, tokens, monkeypatch, tmp_path):
    shows = []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw, metadata: shows.append(bundle))
    assert shown(capsys, Model(), tokens) + shown(capsys, Model(), tokens, html=tmp_path / "trace.html") == ""
    tree, link = shows
    assert {"pre", "details", "summary", "b"} <= set(Balance(tree["text/html"]).seen)
    stripped = unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", tree["text/html"], flags=re.DOTALL)).strip("\n")
    assert all(line.rstrip() for line in stripped.splitlines()) and max(map(len, stripped.splitlines())) <= 110
    squeezed = [re.sub(r"[\s│├└─]", "", text) for text in (stripped, tree["text/plain"])]
    assert sorted(squeezed[0]) == sorted(squeezed[1])
    assert link["text/plain"].endswith("trace.html") and f'href="{tmp_path / "trace.html"}"' in link["text/html"]


def test_the_page_is_self_contained_and_well_formed(tmp_path, capsys, tokens):
    text = shown(capsys, Model(), tokens, html=tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    seen = set(Balance(page).seen)
    assert "trace.html" in text and {"details", "summary", "style"} <= seen and not {"script", "link", "img"} & seen
    assert "http" not in page and str(tmp_path) not in page and "color-scheme: light dark" in page
    assert "layers.0–7" in page and "# (B, num_heads, T, head_dim) heads first" in page
    assert 'class="wide"' in page and 'class="narrow"' in page  # for phones


def test_of_layers_that_differ_the_first_is_open(tmp_path, tokens):
    with show_shapes(model := Model(num_layers=3), values=True, html=tmp_path / "trace.html"):
        model(tokens)
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    opened = re.findall(r"<details( open)?><summary>[^<]*<span[^<]*</span><b>layers.(\d)", page.partition('class="narrow"')[0])
    assert opened == [(" open", "0"), ("", "1"), ("", "2")]


@pytest.fixture
def comments_of(tmp_path):
    """Runs a function body on x (2, 5, 12) and gives what its shape comments are told."""

    def run(*body, calls=1):
        path = tmp_path / "block.py"
        text = "SIZE = 3\nclass Block:\n  heads, width = 3, 4\n  def forward(self, x, **needs):\n    B, T, D = x.shape\n"
        path.write_text(text + "".join(f"    {line}\n" for line in body), encoding="utf-8")
        names = {}
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
        linecache.checkcache(str(path))
        comments = ShapeComments(path)
        for _ in range(calls):
            with comments:
                names["Block"]().forward(torch.zeros(B, T, DIM))
        return comments

    return run


@pytest.mark.parametrize("line", [
    "y = x  # (B, T, D)",
    "y = x  # (B, T, heads * width) and some words",
    "y = x  # (2, T, self.heads * 3 + SIZE)",
    "y = x  # (..., D)",
    "y = x  # (B, ..., T, D)",
    "y = x.sum()  # ()",
    "y = x[0, 0]  # (D,)",
    "y = x  # (Vaswani and others) is no shape",
    "y, z = x, x[0]  # (B, T, D), (T, D)",
    "y, z = x, x + 1  # (B, T, D) both",
    "return x[:, 0]  # (B, D)",
    "for row in x: y = row  # (T, D)",
])  # fmt: skip
def test_right_shape_comments(comments_of, line):
    comments = comments_of(line)
    assert (comments.wrong, comments.unchecked, comments.never_ran) == ([], [], [])


@pytest.mark.parametrize("line, problem", [
    ("y = x  # (B, D, T)", "block.py:6: the comment says (B, D, T), that is (2, 12, 5), but y is (2, 5, 12)"),
    ("y = x  # (B, T)", "but y is (2, 5, 12)"),
    ("y = x  # (D, ...)", "that is (12, ...), but y is (2, 5, 12)"),
    ("y = x[0, 0]  # (D, D, ...)", "but y is (12,)"),
    ("y = 3  # (B, T)", "this line makes no tensor"),
    ("y, z = x, x[0]  # (B, T, D) both", "but z is (5, 12)"),
    ("y, z = x, x[0]  # (B, T), (B, T), (B, T)", "names 3 shapes, but the line makes 2 tensors"),
    ("return x  # (B, D)", "but return is (2, 5, 12)"),
])  # fmt: skip
def test_wrong_shape_comments(comments_of, line, problem):
    comments = comments_of(line, calls=2)
    assert len(comments.wrong) == 1 and problem in comments.wrong[0]


@pytest.mark.parametrize("line, problem", [
    ("y = x  # (B, T, Q)", "cannot be checked: Q is not an int in scope"),
    ("y = x  # (B, T, print(1))", "print(1) is not a size"),
    ("y = x  # (B, T, D // 0)", "cannot be checked"),
    ("y = x  # (B, T dim, D)", "it is not a list of sizes in parentheses"),
])  # fmt: skip
def test_shape_comments_that_cannot_be_checked(comments_of, line, problem):
    comments = comments_of(line, calls=2)
    assert comments.wrong == [] and len(comments.unchecked) == 1 and problem in comments.unchecked[0]


def test_a_comment_on_a_line_that_never_runs_is_reported_until_it_runs(comments_of):
    comments = comments_of("if D == 0:", "    y = x  # (B, T)", "y = x  # (B, T, D)")
    assert comments.never_ran == ["block.py:7: never ran: # (B, T)"]
    with pytest.raises(FileNotFoundError):
        ShapeComments("no_such_file.py")


def test_show_shapes_marks_a_wrong_comment(capsys):
    class Wrong(LoggingModule):
        def forward(self, x):
            B, T = x.shape
            return x + 1  # (T, B)

    text = shown(capsys, Wrong(), torch.zeros(2, 3))
    assert "✗ the comment says (T, B), that is (3, 2), but return is (2, 3)" in text


def test_every_shape_comment_of_the_base_model():
    layer = ["Norm->Attn->+->Norm->MLP->+", "Norm->MLP(gated=False)->+"]
    size = {"dim": 14, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "max_seq_len": 7}
    tokens = torch.arange(10).view(2, 5)
    with ShapeComments(inspect.getfile(GPT)) as comments:
        for cap in (None, 30.0):  # PyTorch's attention, and the one that is written out
            model = GPT(ModelConfig(layers=layer, attention_soft_cap=cap, **size), vocab_size=11)
            model(tokens, tokens, story_ids=torch.zeros_like(tokens))
            model(tokens, memory=tokens)
            cache = Cache()
            model(tokens, cache=cache)
            model(tokens[:, :1], cache=cache)
    assert (comments.wrong, comments.unchecked, comments.never_ran) == ([], [], [])
