"""The exercises: `asking` has what all of them share, and `lesson_01` to `lesson_12` have those of each lesson."""
