"""The words that tasks are made of, one list for training and one for evaluation; no word is in both.

Words of the sentence templates (``the``, ``of``, ``which`` …) are no subject of a task and are shared.
"""

from __future__ import annotations

from dataclasses import dataclass

EnumWords = tuple[str, tuple[str, ...]]
"""A field's name and the values that it can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """nouns: kinds of records. quantities: whole numbers that a record has; measures: numbers with a fraction; flags:
    what is true or false; enums; texts: short strings; labels: lists of words, and their elements (``tags``); series:
    lists of whole numbers; parts: objects' names, holding numbers (``dimensions``); keys: names of a record's
    identifier. Verbs of the tools by what they do. firsts, lasts, places: names.
    """

    nouns: tuple[str, ...]
    quantities: tuple[str, ...]
    measures: tuple[str, ...]
    flags: tuple[str, ...]
    enums: tuple[EnumWords, ...]
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    tags: tuple[str, ...]
    series: tuple[str, ...]
    parts: tuple[str, ...]
    dimensions: tuple[str, ...]
    extras: tuple[str, ...]
    keys: tuple[str, ...]
    lookup_verbs: tuple[str, ...]
    search_verbs: tuple[str, ...]
    update_verbs: tuple[str, ...]
    create_verbs: tuple[str, ...]
    action_verbs: tuple[str, ...]
    release_verbs: tuple[str, ...]
    calculator_nouns: tuple[str, ...]
    calculator_operands: tuple[str, ...]
    operators: tuple[str, ...]
    limits: tuple[str, ...]
    changes: tuple[str, ...]
    receipts: tuple[str, ...]
    firsts: tuple[str, ...]
    lasts: tuple[str, ...]
    places: tuple[str, ...]

    def all(self) -> set[str]:
        """Every word of every list."""
        found: set[str] = set()
        for name in self.__slots__:
            for entry in getattr(self, name):
                if isinstance(entry, str):
                    found.add(entry)
                else:
                    found.update((entry[0], *entry[1]))
        return found


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _enums(text: str) -> tuple[EnumWords, ...]:
    rows = (line.split(":") for line in text.strip().splitlines())
    return tuple((name.strip(), _split(values)) for name, values in rows)


TRAINING = Words(
    nouns=_split(
        "order device person shipment account invoice product worker vehicle van truck lamp sensor server printer "
        "window garden farm mill shop customer supplier patient doctor lesson exam poem song album film painting "
        "statue bridge tunnel road river lake mountain island village school archive shelf bin crate pallet magnet "
        "engine pump valve wheel tyre bicycle camera lens phone tablet laptop monitor keyboard desk chair sofa carpet "
        "curtain plate bowl knife apron jacket shirt sock helmet glove tent rope boat anchor sail crane ladder drill "
        "hammer loan bond claim contract permit survey report memo badge locker parking meter oven kettle fridge"
    ),
    quantities=_split(
        "stock seats pages floors age score price weight length height width volume speed power voltage pressure mass "
        "distance duration members copies windows doors wheels rooms visits votes points units balance credit debt "
        "budget quota capacity depth area salary bonus shots goals laps turns views likes errors alarms sales returns"
    ),
    measures=_split(
        "rate ratio temperature humidity acidity density grade rating share margin discount tax fee cost dose angle "
        "latency load yield drift offset gain noise current level"
    ),
    flags=_split(
        "insured heated public locked active verified paid fragile urgent shared visible signed sealed tested reserved "
        "taxed cleaned painted charged archived approved blocked hidden loaded mounted printed ready rented sold"
    ),
    enums=_enums("""
status: open closed pending late
colour: red green blue white black
size: small medium large huge
priority: low normal high
season: spring summer autumn winter
material: wood steel glass paper
shape: round square flat oval
role: admin editor viewer guest
plan: basic silver gold
fuel: diesel petrol electric gas
shift: morning evening night
phase: draft review final
direction: north south east west
language: english german french spanish
metal: iron copper zinc tin
tone: warm cold neutral
sector: retail energy health
tier: first second third
"""),
    texts=_split(
        "owner author manager driver tenant editor sponsor agent origin city region street site branch depot title "
        "brand nickname motto team clerk inspector mentor buyer seller"
    ),
    labels=_split("tags colours skills topics genres features tools groups marks options"),
    tags=_split(
        "soft hard light heavy fast slow cheap rare new old quiet loud sharp blunt wet dry clean dirty long short thin "
        "thick bright dark sweet sour plain fancy safe risky empty full local foreign simple complex daily weekly"
    ),
    series=_split("readings scores samples counts prices pulses steps"),
    parts=_split("address casing position frame contact schedule layout range"),
    dimensions=_split("row column zone lane block floor line slot page unit bay aisle x y z"),
    extras=_split("history notes audit remarks summary trace comments forecast journal"),
    keys=_split("id code key number tag sku uid index"),
    lookup_verbs=_split("get fetch lookup read show load describe detail open pull"),
    search_verbs=_split("find list search filter query select scan browse"),
    update_verbs=_split("set update change edit modify put adjust write"),
    create_verbs=_split("add create insert new make register append issue"),
    action_verbs=_split("reserve take use move send lend borrow sell withdraw assign ship claim hold deliver pick"),
    release_verbs=_split("unlock release enable activate wake"),
    calculator_nouns=_split("calculate calculator compute calc math evaluate arithmetic"),
    calculator_operands=_split("a b left right numbers values x1 x2 operands expression"),
    operators=_split("operation op operator function"),
    limits=_split("limit top count maximum batch"),
    changes=_split("changes fields patch data details item"),
    receipts=_split("receipt confirmation reference pass"),
    firsts=_split(
        "Anna Ben Carla David Elena Frank Greta Hugo Ines Jonas Karin Leo Maria Nils Olga Peter Rosa Simon Tina Viktor"
    ),
    lasts=_split(
        "Adler Becker Castro Dietz Engel Fischer Gruber Hansen Ivers Jansen Keller Lorenz Meyer Novak Otto Petrov "
        "Roth Schulz Thiele Weber"
    ),
    places=_split(
        "Berlin Madrid Vienna Prague Dublin Athens Warsaw Zurich Munich Naples Geneva Porto Seville Krakow Bergen "
        "Malmo Graz Basel Turin Lyon"
    ),
)

EVALUATION = Words(
    nouns=_split(
        "flight hotel ticket recipe parcel robot museum train yacht concert course clinic warehouse drone package "
        "satellite telescope cabin booking booklet violin piano orchard vineyard cinema"
    ),
    quantities=_split(
        "passengers nights guests calories servings minutes kilometers bottles exhibits students beds baskets coins "
        "tables pieces stars lectures platforms"
    ),
    measures=_split("fare altitude purity strength brightness toll glare tariff"),
    flags=_split("refundable vegan accessible delayed cancelled confirmed guided waterproof furnished certified"),
    enums=_enums("""
carrier: falcon heron osprey condor
cuisine: thai italian mexican greek
class: economy business premium
terminal: alpha bravo delta
weather: sunny rainy cloudy stormy
mood: happy calm angry
stage: planned boarding landed
flavour: vanilla mint lemon cherry
"""),
    texts=_split("pilot chef curator destination captain conductor host violinist harbour teacher"),
    labels=_split("amenities ingredients instruments themes cargo"),
    tags=_split(
        "sauna pool wifi breakfast balcony garlic pepper basil onion cello flute harp trumpet amber silk velvet marble"
    ),
    series=_split("timings intervals milestones tallies"),
    parts=_split("location itinerary seating luggage"),
    dimensions=_split("gate deck track hall wing seat coach tower"),
    extras=_split("logbook reviews warranty provenance"),
    keys=_split("ref serial handle locator"),
    lookup_verbs=_split("retrieve inspect view check obtain"),
    search_verbs=_split("discover seek explore collect"),
    update_verbs=_split("revise amend alter replace"),
    create_verbs=_split("enter publish compose launch"),
    action_verbs=_split("book allocate dispatch consume board"),
    release_verbs=_split("unseal reopen clear"),
    calculator_nouns=_split("tally abacus reckon"),
    calculator_operands=_split("p q lhs rhs terms formula amounts"),
    operators=_split("sign symbol"),
    limits=_split("ceiling cutoff bound"),
    changes=_split("revision attributes body"),
    receipts=_split("voucher proof stub"),
    firsts=_split("Mara Oskar Priya Quentin Ruth Stefan Ursula Wanda Yusuf Zelda Amir Bianca"),
    lasts=_split("Lindt Moreau Okafor Quist Sato Tanaka Ulrich Varga Wolff Yilmaz Zeller Brandt"),
    places=_split("Oslo Lisbon Helsinki Tallinn Riga Cork Ghent Bruges Verona Split Tromso Leeds"),
)
