"""The articles' claims, judged by code: `python -m data.scripts.claims` fills CLAIMS.md."""
