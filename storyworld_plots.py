"""The plots of the story world, in the template language of `storyworld_grammar`.

A plot has a name, a cast (kinds, or tags of kinds, that may be its hero), morals, and lines: "- " goes on, "/ " starts a paragraph,
other lines continue the one before; || separates ways to tell a whole line. What a line names in {braces} holds for the rest of
the story: the later lines look back to it.
"""

OPENING = """
- Once upon a time, [4*|in a [quiet|busy|sunny|faraway|snowy|green|lovely] [town|valley|village|land|place|country], ]there [3*was|lived]
  @little.a [3*{kind~child}|2*{kind~animal}] named {hero}.
  || Once there was @little.a [3*{kind~child}|2*{kind~animal}] [named|called] {hero}.
  || There was once @little.a [3*{kind~child}|2*{kind~animal}] whose name was {hero}.
  || [Long ago|Not long ago|Far away], @little.a [3*{kind~child}|2*{kind~animal}] named {hero} lived in {kind.home}
  [near|by|beside|not far from] the [river|sea|woods|mountains|old mill|railway|bridge|church|bakery].
- || {Hero} [loved|liked] to {activity} and {activity2}. || Every day {hero} liked to {activity}.
  || {Hero} was {trait.a} {kind}[| and [everyone|all the neighbors|the whole street] liked {hero.him}].
  || {Hero.his} favorite color was {color}[| and {hero.his} favorite food was {food}].
"""

# what several plots say; a line calls them like any list of words
PHRASES = {
    "lesson": "From that day on, {hero} [always remembered|never forgot|knew] that {moral}|"
    "{Hero} [learned|had learned|understood] that {moral}|And so {hero} learned that {moral}|"
    "That [night|evening], {hero} [lay in bed|looked at the moon|hugged {hero.his} pillow] and knew that {moral}|"
    "The moral of the story is that {moral}|[Now|Since then|After that], {hero} [tells|told] everyone that {moral}",
    "hero_was_happy": "{Hero} was @very @happy|{Hero} [smiled|laughed|danced|clapped|sang|cheered] with joy|"
    "{Hero} felt [warm|light|safe|tall|brave|warm inside] and @happy|{Hero.his} [heart was full of joy|eyes were shining|face was bright]|"
    "{Hero} [jumped up and down|spun around|did a little dance|could not stop smiling]",
    "hero_was_sad": "{Hero} was @very @sad|{Hero} [sat down and|began to|started to] [cry|sob|weep|sniffle]|"
    "[Big|Hot|Salty] tears [ran|rolled] down {hero.his} [face|cheeks|nose]|{Hero} felt @sad and did not [want to play|know what to do]",
    "friend_was_happy": "{Friend} was @very @happy|{Friend} [smiled|laughed|danced|clapped|sang|cheered] with joy|"
    "{Friend} [hugged|kissed|thanked] {hero}|{Friend} gave {hero} {gift.a}|{Friend} [jumped up and down|spun around|did a little dance]",
    "thanks": '"[Thank you|Oh, thank you|Thank you so much|Thanks a lot|You are the best], {friend}[|, my friend]!" [said|cried|called] {hero}',
    "friend_thanks": '"[Thank you|Oh, thank you|Thank you so much|Thanks a lot|You are the best], {hero}[|, my friend]!" [said|cried|called] {friend}',
    "seen": "[On the way, |Along the path, |Near the [gate|bridge|corner|fence|mill], ]{hero} [saw|met|passed|waved to|greeted|counted] "
    "[two|three|four|five|six|seven] [snails|ducks|crows|geese|goats|bees|sparrows|frogs|hens|kittens|ponies|turtles|beetles|"
    "butterflies|pigeons|squirrels|moths|ladybugs]",
    "sky": "The sun was [warm|bright|golden|high|shining] and the [birds|robins|larks|bees|crickets] were [singing|busy|humming|loud]|"
    "The wind [blew|sang|whistled|danced] in the [trees|grass|leaves|branches|chimney]|"
    "The sky was [blue|gray|pink|clear|full of clouds] and the air smelled of [rain|flowers|hay|bread|pine|salt|smoke|mint|apples]|"
    "[Soft|Light|White|Puffy|Thin] clouds [floated|drifted|sailed|rolled] over the [roofs|hills|fields|treetops|river]",
    "fun": "They [played {game}|played {game} and {game2}|played {game}, {game2} and {game3}] until "
    "[it got dark|dinner|the stars came out|the moon was up|bedtime|they were tired|the [church|school|dinner] bell rang]",
    "close": "<trait>{Hero} really was {trait.a} {kind}|<activity>The next [day|morning], {hero} went out to {activity} again|"
    "That night, {hero} dreamed of {creature.a} [in a {color2} hat|with a {color2} umbrella|on a {color2} ship|who could dance|"
    "that sang a song]|They [all |]lived happily ever after|The end|"
    "Then they [shared|ate] {food.a} and [laughed|talked|sang|told jokes] until [bedtime|it was dark|the candles burned low]",
    "bye": "<trait>{Hero} really was {trait.a} {kind}|<activity>The next [day|morning], {hero} went out to {activity} again|"
    "That night, {hero} dreamed of {creature.a} [in a {color2} hat|with a {color2} umbrella|on a {color2} ship|who could dance|"
    "that sang a song]|The end|{Hero} ate {food.a} for [supper|dinner] and [went to bed early|slept very well|told {hero.his} teddy bear about it]",
}

TEXT = """
== the lost toy
cast: child animal
morals: it is good to look after your things|friends help each other|two pairs of eyes see more than one|
    you should never give up looking
/ {Hero} had {toy.a} that {toy.was} [new|very old|{color}|a present from {hero.his} {family}]. [{Hero} wanted to|More than anything,
  {hero} liked to] {use}.
- @When, {hero} [took|brought] the {toy} {place.to}. || @When, {hero} {kind.went} {place.to} with the {toy}.
- || @Sky. || @Seen. || {Hero.he} [looked at|stopped to see|wanted to see] {sight} and {sight2}.
- But when {hero.he} [looked down|turned around|stopped to rest|wanted to play], the {toy} {toy.was} [gone|not there|missing|lost]!
- @Hero_was_sad.
/ @Then {kind2.a} named {friend} came by. "[What is wrong|Why are you so sad|What happened|What is the matter], {hero}?" asked {friend}.
- "I lost my {toy}," [said|cried|sobbed|told {friend.him}] {hero}. "Now I can not {use}[| anymore| any longer| today]!"
- "[Do not worry|Do not cry|Cheer up|Dry your tears]," @said {friend}. "[I will help you|We will find {toy.it}|Let us look together]."
/ They @looked {spot}, but the {toy} {toy.was} not there. || First they @looked {spot}. There was [nothing|only {creature.a}|just a
  {color2} [leaf|stone|flower]] there.
- @Finally, {friend} @looked {spot2}. "[Come here|Look|Come and see]!" {friend.he} [called|cried|shouted]. There {toy.was} the {toy}!
- @Thanks. @Hero_was_happy.
- Now {hero.he} could {use}[| again| once more][| with {friend}].
- @Lesson. || @Lesson. @Close.
"""


def parse_plots(text: str) -> dict[str, dict[str, str]]:
    """The plots by name, each with its cast, morals and text."""
    plots = {}
    for block in text.strip().split("== ")[1:]:
        head, *lines = block.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("/ "))
        fields = " ".join(line.strip() for line in lines[:start])
        cast, morals = fields.removeprefix("cast: ").split(" morals: ")
        plots[head] = {"cast": cast, "morals": morals.replace("| ", "|"), "text": "\n".join(lines[start:])}
    return plots


PLOTS = parse_plots(TEXT)
