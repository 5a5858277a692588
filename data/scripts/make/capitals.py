"""Questions for the capitals of countries, with the capital alone as the answer: facts, which fine-tuning hardly teaches.

    python -m data.scripts.make.capitals [FOLDER]

Half of the countries, drawn by a seed, are for training and the other half for the test. So a model can learn from the
training questions how to answer; the answers of the test it must know.
"""

import json
import random
import sys
from pathlib import Path

from data.scripts import DATA

CAPITALS = {
    "Afghanistan": "Kabul", "Albania": "Tirana", "Algeria": "Algiers", "Angola": "Luanda", "Argentina": "Buenos Aires",
    "Armenia": "Yerevan", "Australia": "Canberra", "Austria": "Vienna", "Azerbaijan": "Baku", "Bangladesh": "Dhaka",
    "Belarus": "Minsk", "Belgium": "Brussels", "Bosnia and Herzegovina": "Sarajevo", "Brazil": "Brasília",
    "Bulgaria": "Sofia", "Cambodia": "Phnom Penh", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogotá", "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia", "Denmark": "Copenhagen",
    "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Finland": "Helsinki",
    "France": "Paris", "Georgia": "Tbilisi", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Guatemala": "Guatemala City", "Haiti": "Port-au-Prince", "Hungary": "Budapest", "Iceland": "Reykjavík",
    "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin",
    "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi", "Latvia": "Riga",
    "Lebanon": "Beirut", "Libya": "Tripoli", "Lithuania": "Vilnius", "Luxembourg": "Luxembourg", "Madagascar": "Antananarivo",
    "Malaysia": "Kuala Lumpur", "Mali": "Bamako", "Malta": "Valletta", "Mexico": "Mexico City", "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat", "Nepal": "Kathmandu", "New Zealand": "Wellington", "Nicaragua": "Managua", "Nigeria": "Abuja",
    "North Korea": "Pyongyang", "Norway": "Oslo", "Oman": "Muscat", "Pakistan": "Islamabad", "Panama": "Panama City",
    "Paraguay": "Asunción", "Peru": "Lima", "Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow", "Rwanda": "Kigali", "Saudi Arabia": "Riyadh",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "South Korea": "Seoul",
    "Spain": "Madrid", "Sudan": "Khartoum", "Sweden": "Stockholm", "Switzerland": "Bern", "Syria": "Damascus",
    "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Uganda": "Kampala", "Ukraine": "Kyiv",
    "United Kingdom": "London", "Uruguay": "Montevideo", "Venezuela": "Caracas", "Vietnam": "Hanoi", "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}  # fmt: skip


def made() -> dict[str, str]:
    """The text of each file, by its name."""
    countries = sorted(CAPITALS)
    random.Random(0).shuffle(countries)
    half = len(countries) // 2
    files = {}
    for name, part in (("train", countries[:half]), ("test", countries[half:])):
        chats = [
            [
                {"role": "user", "content": f"What is the capital of {country}?"},
                {"role": "assistant", "content": CAPITALS[country]},
            ]
            for country in part
        ]
        files[f"{name}.jsonl"] = "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
    return files


def main(folder: Path = DATA / "chats" / "capitals") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
