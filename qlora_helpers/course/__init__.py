"""What the lessons are built with: `checks` of numbers, `exercises`, `tables`, figures (`plots`), sliders (`widgets`), a
`quiz` for each, and the troubleshooting page."""
