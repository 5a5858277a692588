"""Suggested settings: every value has a source, every suggestion is a valid run that fits, and the table decides."""

import json
from dataclasses import fields, replace
from math import ceil

import pytest
from IPython.lib.pretty import pretty

from data.scripts.measure.held_out import exact_match
from data.scripts.measure.runs_at_rates import best_rate
from qlora_helpers import suggestions
from qlora_helpers.json_files import read_json
from qlora_helpers.memory import ModelShape, find_gpu, find_shape, predict
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.statistics import difference, smallest_difference
from qlora_helpers.suggestions import FirstChange, first_changes, read_table, suggest_settings
from qlora_helpers.units import GIB
from tests.memory.made_up import card

SHAPES = {
    name: find_shape(name)
    for name in (
        "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B",
        "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-70B",
    )
}  # fmt: skip
QWEN_7B = SHAPES["Qwen/Qwen2.5-7B"]
TINY = ModelShape.from_config(data_path("tiny-llama"))
ROWS = (20, 60, 133, 134, 500, 1_000, 9_209, 10_001, 30_000, 1_000_000)
SETTINGS = [name for name in read_table() if name not in ("sources", "first_changes")]
IN_SETTINGS = {field.name for field in fields(Settings)} - {"epochs"}  # the steps are in their place


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The table, to be changed: what is written back is what suggestions are made from."""
    changed = read_table()
    path = tmp_path / "suggestions.json"
    monkeypatch.setattr(suggestions, "TABLE", path)

    def write():
        path.write_text(json.dumps(changed), encoding="utf-8")

    write()
    return changed, write


# ---- The table


@pytest.mark.parametrize("name", SETTINGS)
def test_each_value_has_a_condition_a_reason_and_sources_that_are_listed(name):
    known = read_table()["sources"]
    entries = read_table()[name]
    for entry in entries:
        assert entry["when"] and entry["why"] and entry["value"] is not None
        assert entry["sources"], "a value without a source"
        for source in entry["sources"]:
            assert source["source"] in known
            assert source["says"] and "; " not in source["says"], "semicolons part the sources"
    limits = [entry["parameters_up_to"] for entry in entries]
    assert limits[-1] is None and None not in limits[:-1], "every model must find an entry"
    assert limits[:-1] == sorted(limits[:-1])


def test_each_source_is_used_and_has_a_place():
    table = read_table()
    entries = [entry for name in (*SETTINGS, "first_changes") for entry in table[name]]
    used = {source["source"] for entry in entries for source in entry["sources"]}
    assert used == set(table["sources"])
    for source in table["sources"].values():
        assert source["name"] and source["url"].startswith(("https://", "data/"))


SHARED = "QLoRA NF4 + double quant"  # at rank 16, on all linear layers


def of_kind(kind, rate, what="exact_match"):
    """A test result of lesson 7's runs, by seed."""
    runs = read_json(data_path("measured", "comparisons.json"))["runs"]
    mine = [run for run in runs if (run["kind"], run["learning_rate"]) == (kind, rate)]
    return {run["seed"]: run[what] if what in run else run["test"][what] for run in mine}


def measured(kind, rate, what="exact_match"):
    values = of_kind(kind, rate, what).values()
    return f"{100 * sum(values) / len(values):.0f} %"


def of_both(kind, other):
    """The results of a kind at its own rate, of the seeds that another has at its."""
    theirs = of_kind(other, own_rate(other))
    return {seed: share for seed, share in of_kind(kind, own_rate(kind)).items() if seed in theirs}


def own_rate(kind):
    return best_rate(read_json(data_path("measured", "comparisons.json"))["runs"], kind, exact_match)


def compared(one, other):
    """A paired difference of two kinds of runs, each by seed, as the table writes it."""
    found = difference([one[seed] for seed in sorted(one)], [other[seed] for seed in sorted(other)])
    text = f"{100 * abs(found.mean):.1f} ± {100 * found.half:.1f} points, compared seed by seed"
    return text + (
        f", within noise, and {100 * smallest_difference(found):.1f} would have shown" if found.is_noise else ""
    )


def said(name, place=-1, source="this course"):
    return next(one["says"] for one in read_table()[name][place]["sources"] if one["source"] == source)


def test_what_the_course_is_said_to_have_measured_it_has():
    rates, written = (
        said("learning_rate", 0),
        {2e-4: "2e-4", 1e-3: "1e-3", 1.5e-3: "1.5e-3", 3e-3: "3e-3", 6e-3: "6e-3"},
    )
    for rate in (2e-4, 1e-3, 1.5e-3, 6e-3):
        assert f"{measured(SHARED, rate)} at {written[rate]}" in rates
    assert len(of_kind(SHARED, 1.5e-3)) == 5 and "with five seeds" in rates
    assert {len(of_kind(SHARED, rate)) for rate in (2e-4, 1e-3, 6e-3)} == {2} and "two" in rates
    for rate in (1e-3, 1.5e-3):
        assert f"{measured(SHARED, rate, 'recall')} at {written[rate]}" in rates
    assert own_rate(SHARED) == 1.5e-3 and "1.5e-3 was the best of seven rates" in said("short_run_factor", 0)
    assert f"{measured(SHARED, 1.5e-3)} exact match, {measured(SHARED, 1e-3)} at 1e-3" in said("short_run_factor", 0)
    layers = said("target_modules")
    assert layers.startswith(f"at rank 16 {measured(SHARED, 1.5e-3)} exact match with all")
    for part in ("attention", "MLP"):
        kind = f"rank 16, {part}"
        rate = own_rate(kind)
        found = f"{measured(kind, rate)} with {part} alone: {compared(of_both(SHARED, kind), of_both(kind, SHARED))}"
        assert found in layers
    forgets = next(change.source for change in first_changes() if "forgets" in change.symptom)
    for rate in (1e-3, 3e-3, 6e-3):
        assert f"{measured(SHARED, rate, 'recall')} at {written[rate]}" in forgets
    scores = read_json(data_path("tiny-llama", "scores.json"))
    right = f"{100 * scores['exact_match_after']['NF4']:.0f} % exact match"
    assert said("examples", 0).startswith(right) and said("dropout", 0).startswith(right)


def test_what_the_suggestions_taught_the_shipped_model_is_said_as_measured():
    runs = read_json(data_path("measured", "suggestions.json"))["runs"]

    def by_seed(label):
        found = {run["seed"]: run["exact_match"] for run in runs if (run["label"], run["rows"]) == (label, 60)}
        assert len(found) == 3
        return found

    def share(label):
        return f"{100 * sum(by_seed(label).values()) / 3:.0f} %"

    def against(label):
        return compared(by_seed("suggested"), by_seed(label))

    steps = f"60 chats in batches of 4: {share('half as many steps')} exact match after 75 steps, {share('suggested')} after 150"
    assert said("fewest_steps", 0) == f"{steps}: {against('half as many steps')}"
    warmup = f"60 chats, 150 steps: {share('half the warm-up')} exact match with 5 % of warm-up, {share('suggested')} with 10 %"
    assert said("warmup_share") == f"{warmup}: {against('half the warm-up')}"
    rate = f"in 150 steps of 4: {share('suggested')} exact match at 1.5e-3, {share('learning rate 0.001')} at 1e-3"
    assert said("short_run_factor", 0).endswith(f"{rate}: {against('learning rate 0.001')}")


def test_there_is_a_first_change_for_each_way_in_which_runs_go_wrong():
    changes = first_changes()
    assert all(isinstance(change, FirstChange) and all(change) for change in changes)
    symptoms = " | ".join(change.symptom for change in changes)
    for word in ("NaN", "validation", "hardly falls", "never end", "base model", "forgets", "out of memory"):
        assert word in symptoms
    assert "qlora_helpers memory" in changes[-1].change


# ---- Suggestions


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("gpu", ["t4", "4090", "a100-80", "h200"])
def test_a_suggestion_is_a_run_that_fits_or_says_what_would_help(name, gpu):
    shape, room = SHAPES[name], find_gpu(gpu).usable_bytes
    for rows in ROWS:
        try:
            found = suggest_settings(shape, rows, gpu)
        except ValueError as error:
            assert name.endswith(("14B", "32B", "70B")) and gpu in ("t4", "4090")
            assert "What would help:\n- " in str(error)
            continue
        settings = found.settings
        assert found.prediction == predict(shape, settings, gpu)
        assert found.prediction.fits and found.prediction.device_bytes <= room
        assert settings.method == "qlora" and settings.rank <= 256
        assert settings.batch_size * settings.accumulation == min(rows, settings.batch_size * settings.accumulation)
        assert 1 <= settings.warmup_steps <= settings.steps


def test_no_model_of_the_list_is_refused_where_it_does_fit():
    assert suggest_settings(SHAPES["meta-llama/Llama-3.1-70B"], 500, "a100-80").settings.learning_rate == 1e-4
    assert suggest_settings(QWEN_7B, 1_000_000, "t4").settings.rank >= 16


@pytest.mark.parametrize("shape", [*SHAPES.values(), TINY], ids=lambda shape: shape.name)
def test_more_rows_mean_fewer_epochs_and_more_examples_larger_batches_and_ranks(shape):
    found = [suggest_settings(shape, rows) for rows in range(1, 1_000)]
    found += [suggest_settings(shape, rows) for rows in (*range(1_000, 40_000, 791), 10**6)]
    epochs = [one.reasons["epochs"].value for one in found]
    assert epochs == sorted(epochs, reverse=True) and max(epochs) <= 10 and min(epochs) == 1
    batches = [one.settings.batch_size * one.settings.accumulation for one in found]
    assert batches == sorted(batches) and batches[-1] == 16
    ranks = [one.settings.rank for one in found]
    assert ranks == sorted(ranks) and ranks[0] == 16


def test_larger_models_get_no_higher_learning_rate():
    found = [suggest_settings(shape, 5_000, "a100-80") for shape in (TINY, *SHAPES.values())]
    rates = [one.settings.learning_rate for one in found]
    assert rates == sorted(rates, reverse=True)
    assert set(rates) == {1e-3, 2e-4, 1e-4}


def test_few_rows_train_for_the_fewest_steps_and_short_runs_at_a_higher_rate():
    sixty, twenty = (suggest_settings(QWEN_7B, rows, "l4") for rows in (60, 20))
    assert sixty.settings.steps >= 100 and sixty.settings.learning_rate == 2e-4
    assert twenty.reasons["epochs"].value == 10 and twenty.settings.steps == 50
    rate = twenty.reasons["learning_rate"]
    assert rate.value == pytest.approx(3e-4) and "1.5 times the usual 0.0002" in rate.reason
    assert "about 15 times" in rate.source and "2e-4 for 7B and 13B" in rate.source


def test_the_run_of_the_paper_comes_out_again():
    found = suggest_settings(QWEN_7B, 10_000, "a100-80")
    assert (found.settings.steps, found.settings.batch_size * found.settings.accumulation) == (1_875, 16)
    assert suggest_settings(QWEN_7B, 20_000, "a100-80").settings.steps == 1_875


def test_the_rank_holds_the_data_or_is_the_highest():
    per_rank = QWEN_7B.lora_parameters(1)
    assert suggest_settings(QWEN_7B, 1_000, "h200", tokens=16 * per_rank * 2).settings.rank == 16
    assert suggest_settings(QWEN_7B, 1_000, "h200", tokens=16 * per_rank * 2 + 1).settings.rank == 32
    full = suggest_settings(QWEN_7B, 1_000_000, "h200", tokens=10**12)
    assert full.settings.rank == 256 and "full fine-tuning may learn more" in full.reasons["rank"].reason
    rows_times_length = suggest_settings(QWEN_7B, 100_000, "h200", max_length=1_024)
    assert rows_times_length.settings == suggest_settings(QWEN_7B, 100_000, "h200", 1_024, 100_000 * 1_024).settings


def test_the_batch_grows_with_the_card_and_checkpointing_goes():
    small, large = (suggest_settings(QWEN_7B, 10_000, gpu) for gpu in ("3080", "h200"))
    assert small.settings.batch_size < large.settings.batch_size
    assert small.settings.gradient_checkpointing and not large.settings.gradient_checkpointing
    for one in (small, large):
        spare = max(GIB, one.gpu.usable_bytes * 0.1)
        assert one.prediction.spare_bytes >= spare - 1
        assert one.notes == ()


def test_a_card_without_room_to_spare_is_used_with_a_warning():
    least = replace(
        suggest_settings(QWEN_7B, 500, "l4").settings, batch_size=1, accumulation=8, gradient_checkpointing=True
    )
    needs = predict(QWEN_7B, least, "l4").device_bytes
    found = suggest_settings(QWEN_7B, 500, card(needs))
    assert found.settings == least and found.prediction.spare_bytes == 0
    assert "less than 1.00 GiB to spare" in found.notes[0]
    with pytest.raises(
        ValueError, match=r"NVIDIA L4: Qwen/Qwen2.5-7B does not fit.*rank 16. What would help:\n- .*rank 8"
    ):
        suggest_settings(QWEN_7B, 500, card(needs - 1))


def test_a_rank_that_leaves_no_room_is_lowered_and_that_is_said():
    found = suggest_settings(QWEN_7B, 1_000_000, "3080")
    assert 16 <= found.settings.rank < 256
    assert f"The rank is {found.settings.rank} and not 256" in found.notes[0]
    assert "rank 256 could hold the data" in found.reasons["rank"].reason
    assert found.reasons["rank"].value == found.settings.rank


@pytest.mark.parametrize("gpu", [None, "t4"])
@pytest.mark.parametrize("shape", [QWEN_7B, TINY], ids=lambda shape: shape.name)
def test_each_reason_is_for_the_value_that_the_settings_have(shape, gpu):
    found = suggest_settings(shape, 500, gpu)
    assert {"steps", "learning_rate", "rank", "batch_size", "accumulation", "epochs", "validation_rows"} <= set(
        found.reasons
    )
    for name, (value, why, _) in found.reasons.items():
        assert why
        assert name not in IN_SETTINGS or getattr(found.settings, name) == value


def test_without_a_gpu_nothing_is_predicted_and_that_is_said():
    found = suggest_settings(TINY, 4_800)
    assert found.prediction is None and found.gpu is None
    assert (found.settings.steps, found.settings.batch_size, found.settings.accumulation) == (300, 16, 1)
    assert found.settings.learning_rate == Settings().learning_rate
    assert "No GPU was named" in str(found) and "without a GPU" in found.title


def test_the_length_is_the_callers_or_the_tables_and_never_more_than_the_model_takes():
    assert suggest_settings(QWEN_7B, 500, "t4", 300).settings.max_length == 300
    assert suggest_settings(QWEN_7B, 500, "t4").settings.max_length == 2_048
    short = replace(QWEN_7B, max_position_embeddings=1_000)
    assert suggest_settings(short, 500, "t4").settings.max_length == 1_000
    with pytest.raises(ValueError, match="max_length=1001: must be a whole number, 1 to 1000"):
        suggest_settings(short, 500, "t4", 1_001)


@pytest.mark.parametrize("rows", [0, -1, 1.5, "many", True, None])
def test_rows_are_a_positive_whole_number(rows):
    with pytest.raises(ValueError, match=r"rows=.*: must be a whole number, 1 or more"):
        suggest_settings(QWEN_7B, rows, "t4")


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"gpu='t44': no GPU is known by this name .*t4"):
        suggest_settings(QWEN_7B, 500, "t44")
    with pytest.raises(ValueError, match=r"shape='Qwen/Qwen2.5-7B': give a shape"):
        suggest_settings("Qwen/Qwen2.5-7B", 500, "t4")
    with pytest.raises(ValueError, match="tokens=0"):
        suggest_settings(QWEN_7B, 500, "t4", tokens=0)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("learning_rate", 5e-5, "learning_rate"), ("alpha", 64, "alpha"), ("dropout", 0.2, "dropout"),
        ("schedule", "cosine", "schedule"), ("max_grad_norm", 0.7, "max_grad_norm"), ("max_length", 512, "max_length"),
        ("warmup_share", 0.2, "warmup_steps"), ("effective_batch", [2], "batch_size"), ("epochs", [2, 2], "steps"),
        ("rank", [8], "rank"), ("fewest_steps", 300, "steps"), ("target_modules", ["q_proj", "v_proj"], "target_modules"),
    ],
)  # fmt: skip
def test_the_table_decides(table, name, value, field):
    changed, write = table
    before = suggest_settings(QWEN_7B, 500, "h200").settings
    for entry in changed[name]:
        entry["value"] = value
    write()
    after = suggest_settings(QWEN_7B, 500, "h200").settings
    assert getattr(after, field) != getattr(before, field)


def test_a_damaged_table_is_said(table, tmp_path):
    (tmp_path / "suggestions.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        suggest_settings(QWEN_7B, 500, "t4")


# ---- How it is shown


def test_it_reads_well_in_a_terminal():
    found = suggest_settings(QWEN_7B, 500, "t4")
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].startswith("Qwen/Qwen2.5-7B (7.6 billion parameters), 500 rows, on a Tesla T4: ")
    (rate,) = (line for line in lines if line.startswith("learning_rate"))
    assert rate.split()[1] == "0.0002"
    for name in ("QLoRA", "Unsloth", "LoRA Without Regret"):
        assert name in " ".join(str(found).split())


def test_it_is_a_table_in_a_notebook_and_plain_types_for_json():
    found = suggest_settings(QWEN_7B, 500, "t4")
    page = found._repr_html_()
    assert page.count("<tr>") == len(found.reasons) + 1 and "2e-4 for 7B and 13B" in page
    assert page.count("text-align:left") == page.count("<td ") + page.count("<th ") == 4 * page.count("<tr>")
    assert pretty(found) == str(found)  # in IPython without HTML
    odd = suggest_settings(replace(QWEN_7B, name="<b>"), 500, "t4")
    assert "<b>" not in odd._repr_html_() and "&lt;b&gt;" in odd._repr_html_()
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["settings"]["learning_rate"] == 2e-4 and plain["gpu"] == "Tesla T4"
    assert plain["reasons"]["rank"]["value"] == 16 and "2 bits per parameter" in plain["reasons"]["rank"]["source"]
    assert plain["predicted_bytes"] == found.prediction.device_bytes


def test_steps_are_those_that_training_makes_of_the_epochs():
    for rows in ROWS:
        found = suggest_settings(QWEN_7B, rows, "h200")
        batch = found.settings.batch_size * found.settings.accumulation
        assert found.settings.steps == ceil(found.reasons["epochs"].value * ceil(rows / batch))


def test_many_rows_are_asked_to_wait():
    (note,) = suggest_settings(QWEN_7B, 60_001, "h200").notes
    assert note.startswith("60,001 rows make 3,751 steps. Train on 30,000 of them first")
    assert suggest_settings(QWEN_7B, 60_000, "h200").notes == ()
