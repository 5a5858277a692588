"""What the lessons are built with: `checks` of numbers, `exercises`, `tables`, figures (`plots`), sliders (`widgets`), and the
troubleshooting page."""
