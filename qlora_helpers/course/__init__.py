"""What the lessons are built with: `checks` of numbers and exercises, figures (`plots`), sliders (`widgets`), and the
troubleshooting page."""
