"""What the lessons are made with: `checks` of numbers and exercises, figures (`plots`), sliders (`widgets`), and the
troubleshooting page."""
