"""`python -m data.scripts.claims`"""

from data.scripts.claims.page import main

main()
