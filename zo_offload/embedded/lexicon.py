"""The rules and words of the review grammar: data only, `grammar.py` expands it.

A rule is a string with slots. `<word>` expands with the polarity of the rule it stands in,
`<-word>` with the opposite one: "<-clause>, but <clause>" says in one line that the clause after
"but" decides. Early words of a polar list are common and late ones rare, as in any language: the
rare ones are what a model that has read little gets wrong. The label words of the task stand in no
list here; only the verdicts of the pretraining text say them.
"""


def _split(phrases: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in phrases.split("/"))


RULES = {
    "sentence": (
        "<clause>.",
        "<clause>.",
        "<setting> <clause>.",
        "<clause>, and <clause>.",
        "<-clause>, but <clause>.",
        "<-clause>, <yet> <clause>.",
        "<although> <-clause>, <clause>.",
        "<neutral>, and <clause>.",
        "<clause>, and <neutral>.",
        "<neutral>, but <clause>.",
        "<hearsay> <-adjective>, but <clause>.",
        "<hearsay> <adjective>, and <clause>.",
        "despite the <-adjective> <noun>, <clause>.",
        "with such <adjective> <plural>, it is no wonder that <clause>.",
    ),
    "clause": ("<plain>", "<plain>", "<flipped>"),
    "plain": (
        "<subject> <adjective>",
        "<subject> <degree> <adjective>",
        "<subject> <degree> <adjective>",
        "<subject> <adjective> and <adjective>",
        "<opinion> the <noun> <adjective>",
        "I <felt> the <noun>",
        "<person> <felt> the <noun>",
        "the <noun> <happened>",
        "the <noun> <happened>",
        "it had <degree> <adjective> <plural>",
        "there was something <adjective> about the <noun>",
    ),
    "flipped": (
        "<subject> <not> <-adjective>",
        "<subject> <not> <-adjective>",
        "I did not <-feel> the <noun>",
        "nobody could <-feel> the <noun>",
        "the <noun> never <-happened>",
        "there was nothing <-adjective> about the <noun>",
    ),
    "subject": ("the <noun> was", "the <noun> was", "the <plural> were"),
    "setting": ("<when>,", "<when>,", "to my surprise,", "as usual,", "in our opinion,"),
    "hearsay": (
        "<person> said it would be",
        "<person> had called it",
        "the posters promised something",
        "I expected it to be",
        "the other reviews called it",
    ),
    "opinion": ("I found", "we found", "<person> found", "everyone at our table called"),
    "item": (
        "<adjective>",
        "<adjective>",
        "<adjective>",
        "<adjective>",
        "I <felt> it",
        "it <happened>",
    ),
    "flipped_item": (
        "<not> <-adjective>",
        "<not> <-adjective>",
        "<not> <-adjective>",
        "<not> <-adjective>",
        "I did not <-feel> it",
        "it never <-happened>",
    ),
    "verdict": (
        "it was <adjective>.",
        "it was <degree> <adjective>.",
        "it was <adjective> and <adjective>.",
        "it was <adjective>, <adjective>, <adjective>.",
    ),
    "idle_verdict": _split(
        "it was a long day./it was raining outside./it was late when we left./it was a Tuesday./"
        "it was the first time for us./it was crowded./it was over by nine."
    ),
    "closing": (
        "I would <again>.",
        "I would not <-again>.",
        "We left <mood>.",
        "We did not leave <-mood>.",
        "My advice is to <advice>.",
        "<stars> stars from me.",
    ),
}

# name: (words of a negative rule, words of a positive rule)
POLAR = {
    "adjective": (
        _split(
            "bad/boring/awful/dull/disappointing/poor/weak/bland/slow/ugly/horrible/dreadful/"
            "tedious/clumsy/stale/messy/annoying/forgettable/pointless/cheap/confusing/lifeless/"
            "sloppy/painful/mediocre/shabby/tiresome/dismal/miserable/pathetic"
        ),
        _split(
            "good/wonderful/excellent/lovely/fun/charming/nice/strong/fresh/beautiful/clever/"
            "brilliant/delightful/superb/amazing/fantastic/impressive/enjoyable/moving/elegant/"
            "memorable/perfect/smart/lively/warm/splendid/pleasant/graceful/gorgeous/stunning"
        ),
    ),
    "felt": (
        _split(
            "hated/disliked/regretted/complained about/could not stand/laughed at/resented/loathed"
        ),
        _split("loved/enjoyed/liked/admired/praised/adored/treasured/raved about"),
    ),
    "feel": (
        _split("hate/dislike/regret/complain about/mind/resent/loathe"),
        _split("love/enjoy/like/admire/praise/adore/recommend"),
    ),
    "happened": (
        _split("fell apart/let us down/failed/got on my nerves/went wrong/wore thin/fell flat"),
        _split("worked/won us over/came together/made me smile/paid off/shone/hit the mark"),
    ),
    "again": (
        _split("ask for a refund/warn my friends/stay home/look elsewhere/complain to the manager"),
        _split(
            "come back/do it all again/tell my friends/pay twice as much/recommend it to anyone"
        ),
    ),
    "mood": (
        _split("angry/disappointed/in a bad mood/annoyed/unhappy"),
        _split("happy/with a smile/in high spirits/delighted/content"),
    ),
    "advice": (
        _split("stay away/save your money/avoid it/skip it"),
        _split("go soon/give it a try/bring friends"),
    ),
    "stars": (_split("one/two/zero"), _split("four/five/ten")),
}

PLAIN = {
    "degree": _split(
        "very/really/quite/so/truly/rather/remarkably/simply/utterly/incredibly/surprisingly/"
        "downright"
    ),
    "not": _split("not/never/hardly/not at all/far from/anything but"),
    "yet": _split("yet/and still/and yet"),
    "although": _split("although/though/even though/while"),
    "person": _split(
        "my sister/my brother/my wife/my husband/our neighbour/a friend/my boss/my mother/"
        "the critics/my father/the whole family"
    ),
    "when": _split(
        "last night/on Monday/this time/after a long day/on a rainy evening/in the end/"
        "over the weekend/last summer/on our anniversary/after all these years/"
        "on the second visit/before the holidays"
    ),
}

# Each domain adds its own lists, so that a sentence stays with one subject.
DOMAINS = (
    {
        "noun": _split(
            "film/movie/plot/acting/script/dialogue/ending/soundtrack/director/cast/camera work/"
            "first half/sequel/story"
        ),
        "plural": _split(
            "actors/jokes/costumes/songs/special effects/action scenes/characters/villains"
        ),
        "neutral": _split(
            "we sat in the third row/the film was two hours long/"
            "we saw it at the cinema on the corner/the story is set in a small town/"
            "the hero is a retired teacher/it opened in March/the theatre was half full"
        ),
    },
    {
        "noun": _split(
            "restaurant/food/service/soup/pasta/dessert/waiter/menu/wine list/bread/coffee/fish/"
            "atmosphere/kitchen"
        ),
        "plural": _split("portions/noodles/waiters/starters/vegetables/prices/drinks/desserts"),
        "neutral": _split(
            "we ordered the soup and the fish/our table was by the window/"
            "it is next to the station/the kitchen closes at ten/I had the pasta/"
            "there were six of us/the menu is written on a board"
        ),
    },
    {
        "noun": _split(
            "phone/screen/battery/camera/keyboard/packaging/manual/design/sound/charger/software/"
            "setup/case/finish"
        ),
        "plural": _split("buttons/speakers/colours/instructions/updates/cables/photos/features"),
        "neutral": _split(
            "it came in a brown box/I bought it in March/I have used it for three weeks/"
            "it comes in black and white/the parcel arrived on Friday/it weighs about two pounds/"
            "I keep it on my desk"
        ),
    },
    {
        "noun": _split(
            "hotel/room/bed/breakfast/view/location/pool/staff/bathroom/lobby/garden/terrace/"
            "reception/wifi"
        ),
        "plural": _split("pillows/towels/rooms/beds/corridors/curtains/lifts/neighbours"),
        "neutral": _split(
            "we stayed for three nights/our room was on the fourth floor/"
            "the beach is a mile away/breakfast starts at seven/we travelled with two children/"
            "there is a car park behind it/we came by train"
        ),
    },
    {
        "noun": _split(
            "book/novel/writing/opening chapter/translation/cover/heroine/style/mystery/narrator/"
            "final chapter/prose/romance/audio version"
        ),
        "plural": _split(
            "characters/chapters/poems/illustrations/descriptions/twists/footnotes/sentences"
        ),
        "neutral": _split(
            "it has four hundred pages/I read it on the train/it is the second part of a series/"
            "the author lives in Norway/the story takes place in winter/"
            "I borrowed it from the library/it is a thick book"
        ),
    },
    {
        "noun": _split(
            "concert/band/singer/sound/stage/light show/opening act/venue/encore/drummer/setlist/"
            "orchestra/crowd/guitar playing"
        ),
        "plural": _split("songs/seats/violins/drums/vocals/ballads/dancers/solos"),
        "neutral": _split(
            "they played for two hours/we stood near the back/the doors opened at eight/"
            "the tour started in Berlin/there were five people on stage/"
            "we took the last bus home/it was sold out"
        ),
    },
)
