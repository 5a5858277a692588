"""What the lessons check exactly although a GPU may compute it, and why that is right.

A GPU adds in a different order from a CPU, so their floats differ in the last bits. These tests follow each lesson's
source from what depends on the gear (a model loaded for it, and everything made from it) to what is checked exactly: by
`check(..., exact=True)`, or as the answer to an exercise, which goes by its name in `qlora_helpers/course/exercises`. Whatever gets there must be in `DECIDED`. Everything else is
computed on the CPU in every gear; the notebook tests check on two processor instruction sets that it is exact.
"""

import ast
import importlib
import inspect
import re

import nbformat
import pytest

from notebooks.scripts import build
from tests.course.exercises.test_answers import ROOM
from tests.course.exercises.test_answers import of_lesson as exercises_of

# The results of these depend on the gear, unless an argument names the CPU.
OF_THE_GEAR = {
    "build_trainer", "collator_run", "default_model", "detect", "effect_of", "load_base", "load_model", "load_or_shipped",
    "merge", "merge_with_proof", "plan_merge", "prove", "sft_trainer", "train",
}  # fmt: skip

# "count": a whole number or a truth value that does not depend on floats; "text": words, tokens, names and dtypes;
# "same": floats from the same operations on the same device, or what follows from them; "bound": the answer to an exercise
# that is judged by a bound or a tolerance which is far wider than what the last bits can move.
DECIDED = {
    "04_qlora_run": {
        "bytes of 4-bit weights": "count",
        "bytes of their constants": "count",
        "all-linear finds the same": "text",
        "gradient of W": "count",  # there is none
        "dtypes of the adapters": "text",
        "nothing but adapters was trained": "count",
        "recall of the base is as before": "same",  # the base with its adapter switched off, compared with the base
        "50 answers of the loaded adapter are the same": "same",  # saved in float32 and loaded again
        "adapter tensors that differ from the plain run's": "same",  # only in the cpu gear
        "adapter tensors that differ": "same",  # an interrupted run, compared with an uninterrupted one
        "own_question": "text",
        "learns_nothing": "bound",  # the loss falls to a fifth, and half would do
    },
    "06_adapters_and_merging": {
        # All rows are in the same batch, so the products with the base are the same; the adapters' are float32, and
        # their last bits do not decide a word. One answer at a time would also use other kernels for the base.
        "8 answers of a mixed batch, as from each adapter alone": "text",
        "words per answer": "text",
        "without_effect": "text",  # 38 of 40 answers are right, and 34 are enough: the last bits do not decide
    },
    "07_does_it_cost_quality": {
        "rate_for_alpha": "count",  # a loss of 0.63 where 0.9 is enough: the last bits do not decide
    },
    "08_stability": {
        "loss spikes": "count",  # a spike is far above the usual loss: the last bits do not decide
        "the run was stopped": "text",
        "is the end learnt?": "count",
        "cured": "count",  # a loss of 2.0 where 2.5 is enough: the last bits do not decide
        "first tokens": "count",
    },
    "09_out_of_memory": {
        "phases in order": "text",
        "f'a run made to die on its way {where}, by its traceback'": "text",
        "evaluation": "bound",  # what the graph holds grows eightfold, or not at all
    },
    "10_your_own_data": {
        "stopped before the last step": "count",  # sixteen rows are learnt by heart long before
        "called forgotten or broken": "text",  # facts are guessed after this run: the last bits do not decide
        "in_time": "bound",  # a few rows are learnt by heart long before the last step
        "it takes effect": "count",  # the base says something else entirely
        "causes that would take the effect away": "count",  # of its files: the last bits do not decide
        "the cause that is named": "text",  # of the names in its files
        "the way of merging": "text",  # by what the run trained on
        "faults that the proof found": "count",  # of rounding to 16 bits a fifteenth of what is allowed is seen
        "hops that break": "count",  # of rounding to 16 bits a hundredth of what is allowed is seen
        "what breaks": "text",  # of tokens and texts
        "lost": "bound",  # two of three files are those of the base, in which nothing was learnt
    },
}


class Lesson:
    """A lesson's module-level code. `names` have values that depend on the gear; `held` is what is checked exactly."""

    def __init__(self, source: str):
        self.names: set[str] = set()
        self.functions: dict[str, ast.AST] = {}
        for _ in range(2):  # a function may use names that are assigned below it
            self.held: dict[str, bool] = {}  # name: whether it depends on the gear
            self.run(ast.parse(source).body, certain=True)

    def run(self, statements: list[ast.stmt], certain: bool) -> None:
        for statement in statements:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.functions[statement.name] = statement
                continue
            for expression in ast.iter_child_nodes(statement):
                if isinstance(expression, ast.expr | ast.withitem):
                    self.note(expression)
            match statement:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self.assign(target, value, certain)
                case ast.AugAssign(target=target, value=value):
                    self.assign(target, value, certain=False)
                case ast.For(target=target, iter=value):
                    self.assign(target, value, certain)
                case ast.Try(body=body, handlers=handlers):  # an error depends on what was tried
                    self.names |= {h.name for h in handlers if h.name and any(map(self.depends, body))}
                case ast.With(items=items):
                    for item in items:
                        if item.optional_vars:
                            self.assign(item.optional_vars, item.context_expr, certain)
            conditional = isinstance(statement, ast.If | ast.Try | ast.While)
            parts = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
            parts += [handler.body for handler in getattr(statement, "handlers", [])]
            for part in parts:
                self.run(part, certain and not conditional)

    def assign(self, target: ast.expr, value: ast.expr, certain: bool) -> None:
        """A name takes the value's kind; assigning an element can only make its container depend on the gear."""
        depends = self.depends(value)
        elements = target.elts if isinstance(target, ast.Tuple) else [target]
        for name in (node.id for node in ast.walk(target) if isinstance(node, ast.Name)):
            if depends:
                self.names.add(name)
            elif certain and any(isinstance(element, ast.Name) and element.id == name for element in elements):
                self.names.discard(name)

    def note(self, expression: ast.AST) -> None:
        for call in (node for node in ast.walk(expression) if isinstance(node, ast.Call)):
            depends = any(self.depends(part) for part in (*call.args, *call.keywords))
            match call.func:
                case ast.Attribute(value=ast.Name(id=owner), attr="append" | "update" | "add" | "extend") if depends:
                    self.names.add(owner)
            exact = any(keyword.arg == "exact" for keyword in call.keywords)
            match call.func:
                case ast.Attribute(value=ast.Attribute(value=ast.Name(id="exercises"), attr=name), attr="check"):
                    self.held[name] = self.held.get(name, False) or depends
            if isinstance(call.func, ast.Name) and (call.func.id == "exercise" or (call.func.id == "check" and exact)):
                said = call.args[0]
                name = said.value if isinstance(said, ast.Constant) else ast.unparse(said)
                self.held[name] = self.held.get(name, False) or depends

    def depends(self, code: ast.AST, inside: frozenset = frozenset()) -> bool:
        nodes = list(ast.walk(code))
        # local names: parameters, the variables of comprehensions, what a function assigns
        own = {node.arg for node in nodes if isinstance(node, ast.arg)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OF_THE_GEAR:
                if not any(_is_the_cpu(part) for part in (*node.args, *(keyword.value for keyword in node.keywords))):
                    return True
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own:
                function = self.functions.get(node.id)
                if node.id in self.names:
                    return True
                if function and node.id not in inside and self.depends(function, inside | {node.id}):
                    return True
        return False


def _is_the_cpu(argument: ast.expr) -> bool:
    """`cpu`, "cpu" or `detect("cpu")`."""
    return ast.unparse(argument) in ("cpu", "'cpu'", "detect('cpu')")


LESSONS = {name: Lesson((build.SOURCES / f"{name}.py").read_text()) for name in build.lessons()}


@pytest.mark.parametrize("name", LESSONS)
def test_what_a_gpu_computes_is_held_exactly_only_where_that_is_decided(name):
    found = {held for held, depends in LESSONS[name].held.items() if depends}
    cure = "compute it on the CPU (hardware=cpu), give a tolerance, or decide its kind"
    assert found == set(DECIDED.get(name, {})), cure


def as_printed(held: str) -> str:
    """A pattern for the printed name; some names are f-strings."""
    text, *braces = re.split(r"\{.*?\}", held[2:-1] if held.startswith("f'") else held)
    return ".+".join(map(re.escape, (text, *braces)))


@pytest.mark.parametrize("name", DECIDED)
def test_a_decided_kind_is_what_the_lesson_prints(name):
    notebook = nbformat.read(build.EDITIONS["solutions"] / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "\n".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")
    exercises = exercises_of(name[:2]) if (ROOM / f"lesson_{name[:2]}.py").exists() else {}
    for held, kind in DECIDED[name].items():
        assert kind in ("count", "text", "same", "bound")
        if held in exercises:  # whose answer is not printed
            assert re.search(rf"^✓ Exercise {exercises[held].number}, .*: right!$", printed, re.M), held
            continue
        assert kind != "bound", "a check with a bound is not exact"
        value = re.search(rf"^✓ {as_printed(held)}: (.+)$", printed, re.M)
        assert value, f"{held} is not printed"
        if kind != "same" and value[1] != "right!":  # an exercise, whose answer is not printed
            assert "bit for bit" not in value[1], held  # this is only said about tensors
            assert kind == "text" or re.fullmatch(r"-?[\d,]+|True|False|None", value[1]), held


def test_every_helper_that_is_told_the_hardware_is_followed():
    told = set()
    for name in LESSONS:
        for node in ast.walk(ast.parse((build.SOURCES / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("qlora_helpers"):
                module = importlib.import_module(node.module)
                for helper in (getattr(module, alias.name, None) for alias in node.names):
                    if inspect.isfunction(helper) and "hardware" in inspect.signature(helper).parameters:
                        told.add(helper.__name__)
    assert {"load_model", "train"} <= told <= OF_THE_GEAR


CPU = "cpu = detect('cpu')\n"
EXACT = "check('n', got, want, exact=True)"


@pytest.mark.parametrize(
    "source",
    [
        "got = load_model().weight.cpu()",
        "model = load_adapter(load_model(), folder)\ngot = {name: layer.A.cpu() for name, layer in model.named_modules()}",
        "folder = save_model(merge(adapter, '16bit'))\ngot = all(map(torch.allclose, load(folder), plain))",
        CPU + "model = load_model(hardware=cpu)\nmodel = load_model()\ngot = model.weight",
        "def made():\n    return load_model()\n\n\ngot = made()",
        "def made():\n    return model.weight\n\n\nmodel = load_model()\ngot = made()",
        "got = []\nfor layer in load_model():\n    got.append(layer)",
        "got = {}\ngot['a'] = train(load_model()).loss",
        "got = 0\nif True:\n    got = load_model().weight",
        "try:\n    train(settings)\nexcept ValueError as error:\n    got = str(error)",
        "with load_model().off() as got:\n    pass",
    ],
)
def test_what_depends_on_the_gear_is_followed(source):
    assert Lesson(f"{source}\n{EXACT}").held == {"n": True}
    assert Lesson(f"{source}\nexercises.loss.check(got, rank=8)").held == {"loss": True}


@pytest.mark.parametrize(
    "source",
    [
        "got = torch.ones(3)",
        CPU + "got = load_model(hardware=cpu).weight",
        "got = load_model(hardware=detect('cpu')).weight",
        "model = load_model()\nmodel = torch.ones(3)\ngot = model",
        "name = load_model()\ngot = [name for name in (1, 2)]",
        "def loss(model):\n    return model.loss\n\n\nmodel = load_model()\ngot = loss(1)",
    ],
)
def test_what_is_the_cpus_in_every_gear_is_not(source):
    assert Lesson(f"{source}\n{EXACT}").held == {"n": False}
