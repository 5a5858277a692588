"""Chat data: read it from a file, check it, turn it into tokens, and see what is in it before anything is trained."""

from qlora_helpers.chats.files import ChatFile, read_chats, read_file, said_of_the_dropped, write_chats
from qlora_helpers.chats.lengths import Fitted, fit_to_length
from qlora_helpers.chats.marked import MarkedRow, marked_row
from qlora_helpers.chats.messages import Chat, ChatError, check_chats, fault_in, split_question
from qlora_helpers.chats.report import DataReport, report_on
from qlora_helpers.chats.templates import stop_tokens
from qlora_helpers.chats.tokens import check_texts, count_tokens, lengths_of, tokenized
from qlora_helpers.chats.words import tokens_per_word, warning_of_spelling

__all__ = [
    "Chat",
    "ChatError",
    "ChatFile",
    "DataReport",
    "Fitted",
    "MarkedRow",
    "check_chats",
    "check_texts",
    "count_tokens",
    "fault_in",
    "fit_to_length",
    "lengths_of",
    "marked_row",
    "read_chats",
    "read_file",
    "report_on",
    "said_of_the_dropped",
    "split_question",
    "stop_tokens",
    "tokenized",
    "tokens_per_word",
    "warning_of_spelling",
    "write_chats",
]
