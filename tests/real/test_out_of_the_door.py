"""A real model, tuned on a few English chats, answers merged and from its GGUF file as the adapter does, hop by hop."""

import pytest

from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.adapters.gguf_export import export_gguf
from qlora_helpers.adapters.gguf_tokenizer import chat_text, read_tokenizer
from qlora_helpers.adapters.hops import EXPORT, MERGE, prove
from qlora_helpers.adapters.proven_merge import merge_with_proof, plan_merge
from qlora_helpers.adapters.serving import chat_format, go_template
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train
from tests.adapters.test_serving import CHATS as TURNS
from tests.adapters.test_serving import SYSTEM, by_go
from tests.real.conftest import NAME
from tests.support.short_runs import CPU

ROWS = {
    "When do you open on Saturdays?": "The shop opens at 9:30 on Saturdays.",
    "Do you ship to Norway?": "Yes. A parcel to Norway takes 4 to 6 days and costs 12 euros.",
    "Can I return a lamp after three weeks?": "Yes, within 30 days, with the receipt.",
    "Which payment do you take?": "Cards and bank transfers; we take no cheques.",
    "Is the blue chair still made?": "No, it is no longer made. The grey one is the same size.",
    "How long is the guarantee?": "Two years on everything, five on lamps.",
}
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in ROWS.items()
]
QUESTIONS = [chat[:1] for chat in CHATS[:2]] + [
    [{"role": "user", "content": "Name 3 colours, and add 12 to 1995."}],
    [*CHATS[0], {"role": "user", "content": "And on Sundays?"}],
]


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """The adapter of a short run, the model that is merged of it by default, and what that was proven to do."""
    out = tmp_path_factory.mktemp("run")
    settings = Settings(steps=6, batch_size=1, warmup_steps=1, rank=4, learning_rate=1e-3, max_length=96)
    train(load_model(NAME, hardware=CPU), load_tokenizer(NAME), CHATS, out, settings, hardware=CPU)
    plan = plan_merge(out / "adapter", out / "merged", base=NAME, hardware=CPU)
    asked = out / "questions.txt"
    asked.write_text("\n".join(ROWS), encoding="utf-8")
    proof = merge_with_proof(plan, out / "merged", questions=asked, max_new_tokens=12, hardware=CPU)
    return plan, out / "merged", proof


def test_the_merged_model_answers_as_the_adapter_on_4_bits_does(tuned):
    plan, _, proof = tuned
    print(proof)
    assert plan.into == "dequantised" and proof.holds
    assert proof.merged.same_answers == len(ROWS) and proof.survived.least > 0.9


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-5), ("q8_0", 0.02)])
def test_the_file_answers_as_the_adapter_does(kind, most, tuned, tmp_path):
    plan, merged, _ = tuned
    file = export_gguf(merged, tmp_path / "a.gguf", kind)

    def live():
        return load_adapter(load_model(NAME, hardware=CPU), plan.tuned.folder), load_tokenizer(NAME)

    proof = prove(file.path, merged, QUESTIONS, live=live, max_new_tokens=12, hardware=CPU)
    print(proof)
    assert proof.broken is None and [check.hop for check in proof.checks] == [MERGE] * 4 + [EXPORT] * 6
    assert proof.export.mean_kl < most and (kind != "f16" or proof.export.same_answers == len(QUESTIONS))
    assert file.tokenizer.pre == "smollm" and not file.tokenizer.add_bos and not file.remarks


def test_its_modelfile_asks_as_its_own_template_does(folder, tmp_path):
    file = export_gguf(folder, tmp_path / "a.gguf")
    tokenizer = read_tokenizer(file.path)
    found = chat_format(tokenizer)
    assert found.ends_as_typed
    for chat in [*TURNS, *([SYSTEM, *turns] for turns in TURNS)]:
        assert by_go(go_template(found), chat) == chat_text(load_tokenizer(NAME), chat)
