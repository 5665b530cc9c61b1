"""Models x tasks: what is reported, what survives a crash, and what a user is told when something is wrong."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluate_helpers import Scripted
from helpers import make_fused, make_tokenizer
from ultrafuser.cli.main import app
from ultrafuser.errors import ConfigError, DataError, ModelError
from ultrafuser.evaluation.benchmarks import read_docs
from ultrafuser.evaluation.catalog import TASKS, choose_tasks
from ultrafuser.evaluation.results import (
    read_results,
)
from ultrafuser.evaluation.run import EvaluationOptions, evaluate_models
from ultrafuser.model.generator import FusedGenerator

MATH = {doc["question"]: doc["gold"] for doc in read_docs("gsm8k", "embedded")}
CHOICE = {doc["question"]: doc["gold"] for doc in read_docs("aqua", "embedded")}


def knows(question: str) -> str:
    """Right about everything the tiny suite asks."""
    golds = MATH | CHOICE
    return f"The answer is {next(gold for text, gold in golds.items() if question.startswith(text))}."


def options(folder: Path, *tasks: str, **more: object) -> EvaluationOptions:
    return EvaluationOptions(tasks=tasks, folder=folder, **more)  # type: ignore[arg-type]


def test_a_model_that_knows_scores_one_and_one_that_does_not_zero(tmp_path: Path):
    models = {"knows": Scripted(knows, digest="k"), "silent": Scripted(lambda _: "", digest="s")}

    results = evaluate_models(models, options(tmp_path, "tiny_math", "tiny_choice"))

    for task in ("tiny_math", "tiny_choice"):
        knowing, silent = results.score("knows", task), results.score("silent", task)
        assert knowing is not None
        assert silent is not None
        assert knowing.metrics["accuracy"].value == 1.0
        assert knowing.metrics["accuracy"].low > 0.5
        assert silent.metrics["accuracy"].value == 0.0
        assert silent.outcomes == {"unparsed": len(MATH if task == "tiny_math" else CHOICE)}
    difference = next(d for d in results.differences if d.task == "tiny_math")
    assert (difference.first, difference.second, difference.value, difference.n) == ("knows", "silent", 1.0, len(MATH))
    assert difference.p_value == pytest.approx(2 / 2 ** len(MATH))
    assert read_results(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    "cheat",
    [
        "The answer is A, B, C, D or E.",
        "(A) (B) (C) (D) (E)",
        "The answer is " + " or ".join(map(str, range(-10, 500))),
        "\\boxed{" + ", ".join(map(str, range(-10, 500))) + "}",
        "\\boxed{x} for the right x",
        "The answer is the right one, {gold}",
        '{"accuracy": 1.0}',
        "",
    ],
)
def test_a_cheating_model_scores_zero(tmp_path: Path, cheat: str):
    results = evaluate_models({"cheat": Scripted(lambda _: cheat)}, options(tmp_path, "tiny_math", "tiny_choice"))

    assert [score.metrics["accuracy"].value for score in results.scores] == [0.0, 0.0]


def test_a_fused_model_is_evaluated_with_each_specialist_alone(tmp_path: Path):
    generator = FusedGenerator(make_fused(), make_tokenizer())

    results = evaluate_models(
        {"fused": generator}, options(tmp_path, "tiny_math", "tiny_truth", specialists=True, limit=2)
    )

    assert list(results.models) == ["fused", "fused:text", "fused:code", "fused:math"]
    assert len({model.digest for model in results.models.values()}) == 4
    assert generator.model.config.solo is None
    for name in results.models:
        score = results.score(name, "tiny_truth")
        assert score is not None
        assert set(score.metrics) == {"accuracy", "mass"}
        assert score.num_items == 2
        assert score.tokens > 0
        assert score.tokens_per_s is not None
        assert score.peak_memory_bytes > 2**20


def test_what_was_answered_is_never_asked_again(tmp_path: Path):
    first = Scripted(knows, breaks_after=5)
    with pytest.raises(KeyboardInterrupt):
        evaluate_models({"m": first}, options(tmp_path, "tiny_math", batch_size=1))
    second = Scripted(knows)

    results = evaluate_models({"m": second}, options(tmp_path, "tiny_math", batch_size=1))

    assert len(first.asked) == 5
    assert sorted(first.asked + second.asked) == sorted(MATH)
    assert results.scores[0].metrics["accuracy"].value == 1.0
    third = Scripted(knows)
    assert evaluate_models({"m": third}, options(tmp_path, "tiny_math", batch_size=4)).items == results.items
    assert third.asked == []


@pytest.mark.skipif(sys.platform != "linux", reason="a process can reset its peak on Linux alone")
def test_memory_is_that_of_the_models_own_answers_and_outlives_the_run(tmp_path: Path):
    hungry = Scripted(lambda question: str(len(bytearray(1 << 29)) and question), digest="hungry")
    models = {"hungry": hungry, "modest": Scripted(knows, digest="modest")}

    first, second = (evaluate_models(models, options(tmp_path, "tiny_math")).scores for _ in range(2))

    assert first[0].peak_memory_bytes - first[1].peak_memory_bytes > 1 << 28
    assert [score.peak_memory_bytes for score in second] == [score.peak_memory_bytes for score in first]


def test_no_answer_is_longer_than_asked_for(tmp_path: Path):
    """Whatever the task allows; under another bound the model is asked anew."""
    generator = FusedGenerator(make_fused(), make_tokenizer())

    tokens = {}
    for bound in (3, 5):
        results = evaluate_models({"m": generator}, options(tmp_path, "tiny_math", max_tokens=bound, limit=4))
        tokens[bound] = results.scores[0].tokens
        assert results.scores[0].num_cut == 4
        assert results.options["max_tokens"] == bound
        assert f"No answer was longer than {bound} tokens." in results.notes

    assert tokens == {3: 12, 5: 20}
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        options(tmp_path, "tiny_math", max_tokens=0)


def test_another_model_is_asked_anew(tmp_path: Path):
    evaluate_models({"m": Scripted(knows, digest="one")}, options(tmp_path, "tiny_math"))
    other = Scripted(lambda _: "", digest="other")

    results = evaluate_models({"m": other}, options(tmp_path, "tiny_math"))

    assert len(other.asked) == len(MATH)
    assert results.scores[0].metrics["accuracy"].value == 0.0


KILLED = """
import json, os, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
import ultrafuser.evaluation.harness
from evaluate_helpers import Scripted
from ultrafuser.evaluation.run import EvaluationOptions, evaluate_models
folder, log, *stops = sys.argv[1:]

def answer(question):
    with open(log, "a") as file:
        file.write(json.dumps(question) + "\\n")
    if len(Path(log).read_text().splitlines()) == stop:
        os.kill(os.getpid(), 9)
    return "The answer is 7."

for stop in map(int, stops):  # a process for each, with everything imported
    if os.fork() == 0:
        options = EvaluationOptions(tasks=["tiny_math", "tiny_choice"], folder=Path(folder), batch_size=1)
        evaluate_models({{"m": Scripted(answer)}}, options)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_an_evaluation_killed_twice_asks_all_once_but_what_was_in_flight(tmp_path: Path):
    log = tmp_path / "asked"
    script = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent)))
    arguments = [sys.executable, "-c", script, str(tmp_path / "run"), str(log), "3", "12", "0"]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.stdout.split() == ["-9", "-9", "0"], ended.stderr
    asked = list(map(json.loads, log.read_text().splitlines()))
    results = read_results(tmp_path / "run" / "results.json")

    assert len(results.items) == len(set(asked)) == len(MATH) + len(CHOICE)
    # Each kill repeats the one question whose answer was under way, and no other.
    assert len(asked) == len(results.items) + 2
    assert asked[2] == asked[3]
    assert asked[11] == asked[12]


def test_results_do_not_depend_on_the_batch_size(tmp_path: Path):
    generator = FusedGenerator(make_fused(), make_tokenizer())
    items = [
        evaluate_models(
            {"m": generator}, options(tmp_path / str(size), "tiny_math", "tiny_truth", batch_size=size)
        ).items
        for size in (1, 5)
    ]

    for one, other in zip(*items, strict=True):
        assert one.responses == other.responses
        assert one.values == pytest.approx(other.values, abs=1e-4)


def test_truthfulness_is_counted_by_option_and_weighed_by_question(tmp_path: Path):
    """The scripted scores prefer the shorter of Yes and No, whatever is asked: No everywhere."""
    results = evaluate_models({"m": Scripted(str)}, options(tmp_path, "tiny_truth"))

    docs = read_docs("truthfulqa", "embedded")
    metrics = results.scores[0].metrics
    assert metrics["accuracy"].value == pytest.approx(sum(not doc["gold"] for doc in docs) / len(docs))
    groups = {doc["group"]: [d["gold"] for d in docs if d["group"] == doc["group"]] for doc in docs}
    assert metrics["mass"].value == pytest.approx(sum(sum(g) / len(g) for g in groups.values()) / len(groups))
    assert len(results.items) == len(groups)


def test_given_answers_begin_as_a_model_would_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a conversation an answer begins without the space that lm-eval puts before an option in plain text."""
    model, answers = Scripted(str), []
    score = model.score
    monkeypatch.setattr(model, "score", lambda asked: answers.extend(c[-1].content for c in asked) or score(asked))
    places = {"truthfulqa_mc": "embedded"}

    evaluate_models({"m": model}, options(tmp_path, "tiny_truth", "truthfulqa_mc", places=places))

    offered = {option for doc in read_docs("truthfulqa_mc", "embedded") for option in doc["options"]}
    assert set(answers) == {"Yes", "No"} | offered


def test_options_as_answers_give_mc1_and_mc2(tmp_path: Path):
    """The scripted scores prefer the shortest option."""
    results = evaluate_models(
        {"m": Scripted(str)}, options(tmp_path, "truthfulqa_mc", places={"truthfulqa_mc": "embedded"})
    )

    docs = read_docs("truthfulqa_mc", "embedded")
    right = [
        min((o for o, i in zip(d["options"], d["in_mc1"], strict=True) if i), key=len) == d["options"][d["best"]]
        for d in docs
    ]
    assert results.scores[0].metrics["mc1"].value == sum(right) / len(docs)
    assert 0 < results.scores[0].metrics["mc2"].value < 1


def test_the_limit_counts_questions(tmp_path: Path):
    results = evaluate_models({"m": Scripted(knows)}, options(tmp_path, "tiny_truth", "tiny_math", limit=3))

    assert [score.num_items for score in results.scores] == [3, 3]
    assert any("first 3 questions" in note for note in results.notes)


def test_progress_tells_done_and_total(tmp_path: Path):
    seen: list[tuple[str, str, int, int]] = []
    evaluate_models(
        {"m": Scripted(knows)}, options(tmp_path, "tiny_math", batch_size=3), watch=lambda *told: seen.append(told)
    )
    assert seen == [("m", "tiny_math", done, 8) for done in (0, 3, 6, 8)]


@pytest.mark.parametrize("name", [name for name, info in TASKS.items() if info.kind in ("answers", "scores")])
def test_every_task_file_loads_and_asks(name: str, tmp_path: Path):
    from ultrafuser.evaluation.harness import load_task

    rows = {
        "math": {"problem": "What is half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        "sat_math": {"passage": "Let x = 1.", "question": "What is x?", "options": ["(A)0", "(B)1"], "label": "B"},
    }
    benchmark = TASKS[name].benchmark
    place = "embedded"
    if benchmark in rows:
        place = str(tmp_path / "rows.jsonl")
        Path(place).write_text(json.dumps(rows[benchmark]))
    task = load_task(name, places={benchmark: place}, limit=2)
    task.build_all_requests(limit=1)

    assert task.instances
    assert all(isinstance(instance.args[0], str) and instance.args[0] for instance in task.instances)
    if task.OUTPUT_TYPE == "generate_until":
        assert task.config.generation_kwargs["max_gen_toks"]
    assert ("step by step" in task.instances[0].args[0]) == name.endswith("_cot")


def test_the_users_mathematics_is_graded(tmp_path: Path):
    problems = [
        {"problem": "What is half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        {"problem": "Solve x^2 = 8 for x > 0.", "answer": "2\\sqrt{2}", "unique_id": "two"},
    ]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, problems)))
    answers = {"What is half of one?": "So \\boxed{0.5}.", "Solve x^2 = 8 for x > 0.": "The answer is $\\sqrt{8}$."}

    results = evaluate_models(
        {"m": Scripted(answers.__getitem__)},
        options(tmp_path / "run", "math", places={"math": str(tmp_path / "math.jsonl")}),
    )

    assert [(item.id, item.outcome) for item in results.items] == [("0", "right"), ("two", "right")]


@pytest.mark.parametrize(
    ("tasks", "more", "error", "says"),
    [
        (["gsm9k"], {}, ConfigError, "no task is called gsm9k; known: gsm8k"),
        ([], {}, ConfigError, "at least one task"),
        (["gsm8k"], {"data": Path("/nowhere")}, DataError, "gsm8k: /nowhere has no gsm8k_test.jsonl"),
        (["math"], {"data": Path("/nowhere")}, DataError, "--source math=FILE"),
        (["aqua"], {"places": {"aqua": "/nowhere.jsonl"}}, DataError, "/nowhere.jsonl does not exist"),
        (["mt_bench"], {"places": {"mt_bench": "x"}}, DataError, "judge_prompts: no data folder is given"),
        (["tiny_code"], {"num_samples": 5}, ConfigError, "temperature above 0"),
        (["tiny_math"], {"limit": 0}, ConfigError, "at least 1"),
        (["tiny_math"], {"task_folder": Path("/nowhere")}, ConfigError, "no folder of task files"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_asked(tmp_path: Path, tasks, more, error, says):
    model = Scripted(knows)
    with pytest.raises(error, match=says):
        evaluate_models({"m": model}, options(tmp_path, *tasks, **more))
    assert model.asked == []


def test_a_data_set_of_the_hub_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, **options: object) -> list[dict[str, str]]:
        asked.extend([name, config, options["split"]])
        return [{"question": "1 + 1?", "answer": "#### 2"}] * 3

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [doc["gold"] for doc in read_docs("gsm8k", "hub:openai/gsm8k:main#test", limit=2)] == ["2", "2"]
    assert asked == ["openai/gsm8k", "main", "test"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ('{"question": "q", "answer": "no mark"}', "ends with '#### '"),
        ('{"question": "q"}', "KeyError: 'answer'"),
        ("[1, 2]", "not an object"),
        ("{broken", "not JSON"),
        ("", "is empty"),
    ],
)
def test_a_damaged_data_file_is_named_with_its_line(tmp_path: Path, rows: str, says: str):
    (tmp_path / "g.jsonl").write_text(rows)
    with pytest.raises(DataError, match=says) as caught:
        read_docs("gsm8k", str(tmp_path / "g.jsonl"))
    assert "g.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: mine\noutput_type: nonsense\ndataset_path: json\n", "nonsense"),
        ("task: mine\ncustom_dataset: !function missing.load\n", "missing"),
        ("task: mine\n  bad: [indent\n", "mine|task"),
        ("nothing: here\n", "no task file"),
    ],
)
def test_a_bad_task_file_is_one_clear_error(tmp_path: Path, text: str, says: str):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(text)
    with pytest.raises((ConfigError, DataError), match=says):
        evaluate_models({"m": Scripted(knows)}, options(tmp_path / "run", "mine", task_folder=folder))


def test_a_task_file_of_the_users_is_evaluated(tmp_path: Path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "code.py").write_text(
        "from datasets import Dataset\n"
        "def load(**_):\n    return {'test': Dataset.from_list([{'q': 'One?', 'a': 'yes'}, {'q': 'Two', 'a': 'no'}])}\n"
    )
    (folder / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function code.load\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: q\ndoc_to_target: a\ngeneration_kwargs: {until: [], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )

    results = evaluate_models({"m": Scripted(lambda _: "yes")}, options(tmp_path / "run", "mine", task_folder=folder))

    assert results.scores[0].metrics["exact_match"].value == 0.5


def test_a_generator_without_a_digest_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no digest"):
        evaluate_models({"m": Scripted(knows, digest="")}, options(tmp_path, "tiny_math"))


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path: Path):
    with pytest.raises(ModelError, match="no model can be loaded from"):
        evaluate_models({"m": str(tmp_path / "nothing")}, options(tmp_path, "tiny_math"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_one_line_before_anything_is_loaded(tmp_path: Path, device: str):
    command = ["evaluate", str(tmp_path / "nothing"), "--tasks", "tiny_math", "--device", device]

    result = CliRunner().invoke(app, [*command, "--folder", str(tmp_path / "run")])

    assert isinstance(result.exception, ConfigError)
    assert f"--device {device!r} cannot be used here: write cpu" in str(result.exception)


def test_groups_stand_for_their_tasks():
    assert choose_tasks(["tiny", "tiny_math"]) == ["tiny_math", "tiny_choice", "tiny_truth", "tiny_code"]


def test_the_command_writes_results_and_goes_on(tmp_path: Path):
    make_fused().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    command = ["evaluate", f"tiny={tmp_path / 'm'}", "--tasks", "tiny_math", "--limit", "2"]
    command += ["--folder", str(tmp_path / "run")]

    first, second = (CliRunner().invoke(app, command, catch_exceptions=False) for _ in range(2))

    assert "tiny: tiny_math" in first.stderr
    assert "| tiny | 0." in first.stdout
    assert read_results(tmp_path / "run" / "results.json").score("tiny", "tiny_math") is not None
    assert len((tmp_path / "run" / "journal.jsonl").read_text().splitlines()) == 2
    assert first.stdout.split("## Details")[0] == second.stdout.split("## Details")[0]
    assert (tmp_path / "run" / "results.html").stat().st_size > 500


def test_without_the_extra_the_command_says_what_to_install():
    script = "import sys; sys.modules['lm_eval'] = None\nfrom ultrafuser.cli.main import run; run()"
    result = subprocess.run(
        [sys.executable, "-c", script, "evaluate", "m"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        "ultrafuser: evaluation needs lm_eval: pip install 'ultrafuser[eval]'"
    ]
