"""An exercise with made-up fields."""

from qlora_helpers.course.exercises.asking import Exercise

SAID = "Exercise 2.1, the bits in a code: "


def asked(fault, **fields) -> Exercise:
    usual = {"number": "2.1", "title": "the bits in a code", "kind": "build", "difficulty": "medium", "minutes": 10}
    return Exercise(**usual | {"hints": ("Count first.", "Use a table.")} | fields, fault=fault)
