"""Chat templates as published models have them, written anew and short, each with a byte-level tokenizer that knows its special tokens."""

from dataclasses import dataclass, field
from functools import cache

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data.scripts.make.stand_in_models import make_tokenizer


@cache
def byte_level() -> str:
    """Byte-level BPE of 4,000 tokens, trained on the course's questions, as JSON."""
    return make_tokenizer().backend_tokenizer.to_str()


def tokenizer_with(template, special=(), eos="</s>", bos="<s>", **options):
    """A tokenizer with this chat template and these special tokens."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level()),
        eos_token=eos,
        bos_token=bos,
        pad_token="<pad>",
        chat_template=template,
        **options,
    )
    made.add_special_tokens({"extra_special_tokens": list(special)})
    return made


@dataclass
class Family:
    """A family of models: its template, and what it makes of an answer.

    Attributes:
        end: what ends an answer.
        before: what is learnt before an answer, since the prompt does not have it.
        system: "taken", "left out", or "refused".
        several: whether chats of several answers can be marked.
    """

    template: str
    special: tuple[str, ...]
    end: str
    eos: str = "</s>"
    before: str = ""
    system: str = "taken"
    several: bool = True
    options: dict = field(default_factory=dict)

    def tokenizer(self):
        return tokenizer_with(self.template, self.special, self.eos)


IM = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
THINKING = (
    "{% for m in messages %}"
    "{% set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{% set text = m.content.split('</think>')[-1].lstrip() %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PREFILLED = THINKING.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{{ '<think>\nHm, ' if enable_thinking | default(true) else '' }}",
)
LLAMA_2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content.strip() + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # the system message is in the last question
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if system else messages %}"
    "{% set last = (rest | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (system + '\n\n' if system and m is eq(last) else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no place for a system message') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% set names = {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} %}"
    "{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + names[m.role] }}"
    "{% if m.role == 'assistant' %}{{ '<|START_RESPONSE|>' + m.content.strip() + '<|END_RESPONSE|>' }}"
    "{% else %}{{ m.content.strip() }}{% endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
R1 = DEEPSEEK.replace("'<｜Assistant｜>' + m.content", "'<｜Assistant｜>' + m.content.split('</think>')[-1]").replace(
    "{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")

FAMILIES = {
    "ChatML": Family(CHATML, IM, "<|im_end|>", eos="<|im_end|>"),
    "Qwen2.5": Family(DEFAULT_SYSTEM + CHATML, IM, "<|im_end|>", eos="<|im_end|>"),
    "Qwen3": Family(THINKING, IM, "<|im_end|>", "<|im_end|>", before="<think>\n\n</think>\n\n", several=False),
    "Llama 2": Family(LLAMA_2, (), "</s>"),
    "Llama 3": Family(LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "Mistral": Family(MISTRAL, ("[INST]", "[/INST]"), "</s>"),
    "Mistral 0.1": Family(MISTRAL_WITHOUT_SYSTEM, (), "</s>", system="left out"),
    "Gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<eos>", system="refused"),
    "Phi-3": Family(PHI_3, (*ROLES, "<|end|>"), "<|end|>", "<|endoftext|>"),
    "Zephyr": Family(ZEPHYR, (), "</s>"),
    "Vicuna": Family(VICUNA, (), "</s>"),
    "Command R": Family(
        COMMAND_R,
        ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        before="<|START_RESPONSE|>",
    ),
    "DeepSeek": Family(DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>"), "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "Alpaca": Family(ALPACA, (), "</s>"),
    "gpt-oss": Family(GPT_OSS, HARMONY, "<|return|>", "<|return|>", before="<|channel|>final<|message|>", several=False),
}  # fmt: skip
