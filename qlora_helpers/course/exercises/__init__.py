"""The exercises: `asking` has what all of them share, and `lesson_01` to `lesson_13` have those of each lesson."""
