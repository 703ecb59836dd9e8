"""The plots of the story world, in the template language of grammar.py.

A plot has a name, a cast (kinds, or tags of kinds, allowed as its hero), morals, and lines: "- " starts a line, "/ " a line in a
new paragraph, other lines continue the previous one; || separates alternatives for a whole line. Variables in {braces} keep
their values for the whole story.
"""

OPENING = """
- Once upon a time, [4*|in a [quiet|busy|sunny|faraway|snowy|green|lovely] [town|valley|village|land|place|country], ]there [3*was|lived]
  @little.a [3*{kind~child}|2*{kind~animal}] named {hero}.
  || Once there was @little.a [3*{kind~child}|2*{kind~animal}] [named|called] {hero}.
  || There was once @little.a [3*{kind~child}|2*{kind~animal}] whose name was {hero}.
  || [Long ago|Not long ago|Far away], @little.a [3*{kind~child}|2*{kind~animal}] named {hero} lived in {kind.home}
  [near|by|beside|not far from] the [river|sea|woods|mountains|old mill|railway|bridge|church|bakery].
- 2*In {hero.his} room {hero.he} had @color.a {tool}, @nice.a {tool2} and [a picture of @mood.a @beast|a toy @beast]. || {Hero} always carried @color.a {tool} and @nice.a {tool2}.
  || 2*{Hero}'s neighbor was @mood.a @beast that was always @doing. || {Hero} [loved|liked] to {activity} and {activity2}. || Every day {hero} liked to {activity}.
  || {Hero} was {trait.a} {kind}[| and [everyone|all the neighbors|the whole street] liked {hero.him}].
  || {Hero.his} favorite color was {color}[| and {hero.his} favorite food was {food.many}].
"""

# what several plots say; a line calls them like any list of words
PHRASES = {
    "lesson": "From that day on, {hero} [always remembered|never forgot|knew] that {moral}|"
    "{Hero} [learned|had learned|understood] that {moral}|And so {hero} learned that {moral}|"
    "That [night|evening], {hero} [lay in bed|looked at the moon|hugged {hero.his} pillow] and knew that {moral}|"
    "The moral of the story is that {moral}|[Since then|Ever since], {hero} has told everyone that {moral}",
    "hero_was_happy": "{Hero} was @very @happy|{Hero} [smiled|laughed|danced|clapped|sang|cheered] with joy|"
    "{Hero} felt [warm|light|safe|tall|brave|warm inside] and @happy|{Hero}'s [heart was full of joy|eyes were shining|face was bright]|"
    "2*{Hero} was as @happy as @beast.a with @nice.a @odds|{Hero} [jumped up and down|spun around|did a little dance|could not stop smiling]",
    "hero_was_sad": "{Hero} was @very @sad|{Hero} [began to|started to|wanted to|had to] [cry|sob|weep|sniffle]|"
    "[Big|Hot|Salty] tears [ran|rolled] down {hero.his} [face|cheeks|nose]|{Hero} felt @sad and did not [want to play|know what to do]|"
    "2*{Hero} was as @sad as @beast.a [without|that had lost] its [@odds|@color @odds|@nice @odds]",
    "hero_was_scared": "{Hero} was @very @scared|{Hero}'s [knees|hands|legs] [shook|felt weak]|{Hero} [turned pale|went cold|held {hero.his} "
    "breath|wanted to run away|began to shake]",
    "friend_was_happy": "{Friend} was @very @happy|{Friend} [smiled|laughed|danced|clapped|sang|cheered] with joy|"
    "2*{Friend} was as @happy as @beast.a with @nice.a @odds|{Friend} [hugged|kissed|thanked] {hero}|<!gift>{Friend} gave {hero} {gift.a}|{Friend} [jumped up and down|spun around|did a little dance]",
    "thanks": '"[Thank you|Oh, thank you|Thank you so much|Thanks a lot|You are the best], {friend}[|, my friend]!" [said|cried|called] {hero}',
    "friend_thanks": '"[Thank you|Oh, thank you|Thank you so much|Thanks a lot|You are the best], {hero}[|, my friend]!" [said|cried|called] {friend}',
    "seen": "[On the way, |Along the path, |Near the [gate|bridge|corner|fence|mill], ]{hero} [saw|met|passed|waved to|greeted|counted] "
    "[two|three|four|five|six|seven] [snails|ducks|crows|geese|goats|bees|sparrows|frogs|hens|kittens|ponies|turtles|beetles|"
    "butterflies|pigeons|squirrels|moths|ladybugs]",
    "sky": "The sun was [warm|bright|golden|high|shining] and the [birds|robins|larks|bees|crickets] were [singing|busy|humming|loud]|"
    "The wind [blew|sang|whistled|danced] in the [trees|grass|leaves|branches|chimney]|"
    "The sky was [blue|gray|pink|clear|full of clouds] and the air smelled of [rain|flowers|hay|bread|pine|salt|smoke|mint|apples]|"
    "[Soft|Light|White|Puffy|Thin] clouds [floated|drifted|sailed|rolled] over the [roofs|hills|fields|treetops|river]",
    "saw": "{Hero} saw @mood.a @beast @doing|There was @mood.a @beast @doing|@Mood.a @beast was @doing|"
    "{Hero} [met|passed|waved to|smiled at] @mood.a @beast and @mood.a @beast",
    "bag": "{Hero} packed @color.a @odds, @nice.a @odds and {food.a}|In {hero.his} [bag|pocket|basket] {hero.he} had @color.a @odds and @nice.a "
    "@odds|{Hero.he} [took|carried|brought] @color.a @odds, @color.a @odds and @nice.a @odds",
    "fun": "They [played {game}|played {game} and {game2}|played {game}, {game2} and {game3}] until "
    "[it got dark|dinner|the stars came out|the moon was up|bedtime|they were tired|the [church|school|dinner] bell rang]",
    "close": "<tool>{Hero} [fell asleep|went to sleep] with the {tool} next to {hero.his} [bed|pillow]|<trait>{Hero} really was {trait.a} {kind}|<activity>The next [day|morning], {hero} went out to {activity} again|"
    "2*That night, {hero} dreamed of @mood.a @beast @doing|That night, {hero} dreamed of {creature.a} [in {color2.a} hat|with {color2.a} umbrella|on {color2.a} ship|who could dance|"
    "that sang a song]|They [all |]lived happily ever after|The end|"
    "Then they [shared|ate] {food.a} and [laughed|talked|sang|told jokes] until [bedtime|it was dark|the candles burned low]",
    "bye": "<tool>{Hero} [fell asleep|went to sleep] with the {tool} next to {hero.his} bed|<trait>{Hero} really was {trait.a} {kind}|<activity>The next [day|morning], {hero} went out to {activity} again|"
    "2*That night, {hero} dreamed of @mood.a @beast @doing|That night, {hero} dreamed of {creature.a} [in {color2.a} hat|with {color2.a} umbrella|on {color2.a} ship|who could dance|"
    "that sang a song]|The end|{Hero} ate {food.a} for [supper|dinner] and [went to bed early|slept very well|told the moon about it]",
}

TEXT = """
== the lost toy
cast: child animal
morals: it is good to look after your things|friends help each other|two pairs of eyes see more than one| you should never give
    up looking
/ {Hero} had {toy.a} that {toy.was} [new|very old|{color}|a present from {hero.his} {family}]. [{Hero} wanted to|More than
  anything, {hero} liked to] {use}.
- @When, {hero} [took|brought] the {toy} {place.to}. || @When, {hero} {kind.went} {place.to} with the {toy}.
- || @Sky. || @Seen. || {Hero.he} [looked at|stopped to see|wanted to see] {sight} and {sight2}.
- But when {hero.he} [looked down|turned around|stopped to rest|wanted to play], the {toy} {toy.was} [gone|not
  there|missing|lost]!
- @Hero_was_sad.
/ @Then [3*@mood.a {kind2}|{kind2.a}] named {friend} came by. "[What is wrong|Why are you so sad|What happened|What is the
  matter], {hero}?" @asked {friend}.
- "I lost my {toy}," [said|cried|sobbed|told {friend.him}] {hero}. "Now I can not {use}[| anymore| any longer| today]!"
- "[Do not worry|Do not cry|Cheer up|Dry your tears]," @said {friend}[| @how]. "[I will help you|We will find {toy.it}|Let us
  look together]."
/ They @looked {spot}, but the {toy} {toy.was} not there. || First they @looked {spot}. There was [nothing|only
  {creature.a}|just {color2.a} [leaf|stone|flower]] there.
- @Finally, {friend} @looked {spot2}. "[Come here|Look|Come and see]!" {friend.he} [called|cried|shouted]. There {toy.was} the
  {toy}!
- @Thanks. @Hero_was_happy.
- Now {hero.he} could {use}[| again| once more][| with {friend}].
- @Lesson. || @Lesson. @Close.

== earning a wish
cast: child animal
morals: hard work pays off|good things come to those who work for them|it feels good to earn what you want|a little work brings
    a lot of joy
/ @When, {hero} saw {toy.a} in the window of the [shop|toy shop|little store|old store|corner shop]. "[If only I had|I wish I
  had] {toy.a}," {hero.he} [said|sighed|thought]. "Then I could {use}!" || More than anything, {hero} wanted {toy.a}. "I want to
  {use}," {hero.he} told {hero.his} {family}[| at dinner| one night| in the kitchen| after lunch| on the way home].
- But {hero} had [no money|only one penny|just two coins|only three pennies|nothing to pay with]. || But the {toy} cost
  [ten|twelve|twenty|six|nine] [pennies|coins|shells|nuts] and {hero} had only [one|two|three].
- {Hero.his} {family} had an idea. "[Work for me|Help me today|If you help me], [and you can earn it|and I will pay you],"
  {family.he} @said[| @how]. || "[If you help me|Help me a little, and|Be a good helper, and] I will pay you," @said {hero.his}
  {family}[| @how].
/ So {hero} {chore} and {chore2}. || All @day {hero} worked hard. First {hero.he} {chore}, and then {hero.he} {chore2}.
- || @Saw, but {hero.he} did not stop to play. || {Hero.his} [arms|back|feet|legs|hands] hurt[| and {hero.his} nose was
  [dusty|dirty|hot|wet]], but {hero.he} did not [give up|stop|complain].
- "You {chore} and you {chore2}. [Well done|Good work|I am proud of you]!" @said {family.call}[| @how]. || @Finally, {hero.his}
  {family} [gave {hero.him} the money|counted the coins into {hero.his} hand|paid {hero.him}].
/ {Hero} {kind.went} to the [shop|store] and [bought|paid for|came home with] the {toy}. @Hero_was_happy.
- @Finally, {hero.he} could {use}! || That very @day, {hero.he} began to {use}.
- || {Family.call} [smiled|laughed|clapped] and gave {hero.him} {gift.a}.
- @Lesson. || @Lesson. @Bye.

== learning to share
cast: child animal
morals: sharing is more fun than playing alone|it is nice to share|a toy is twice as good with a friend|friends matter more than
    things
/ {Hero} had {toy.a}, and {hero.he} [never let anyone touch {toy.it}|did not like to share {toy.it}|kept {toy.it} all to
  {hero.himself}|hid {toy.it} from the others].
- @When, [3*@mood.a {kind2}|{kind2.a}] named {friend} [came to play|stopped by|knocked on the door|met {hero.him} {place.in}].
  {Friend} [looked at|saw|pointed at] the {toy}.
- "[May|Can|Could] I [play with|try|hold] {toy.it}, [please|{hero}]?" @asked {friend}. "[I would love to|I want to|I always
  wanted to] {use}."
- "No!" @said {hero}[| @how]. "[The {toy} {toy.is} mine|Get your own {toy}|You will only break {toy.it}|I do not share]!"
- {Friend} [was @sad and|turned around and|said nothing and|wiped {friend.his} eyes and] [went away|left|walked home|sat down
  alone].
/ {Hero} played [alone|all by {hero.himself}|without {friend}]. || {Hero} tried to {use}.
- @Saw. [But there was no one to tell|But nobody laughed with {hero.him}|But {hero.he} could not tell {friend}].
- It was [not much fun|no fun|boring|lonely|too quiet] [alone|without a friend|now]. @Hero_was_sad.
- @Then {hero.he} [looked for|{kind.went} to find|called] {friend}. "I am sorry, {friend}. [Let us|We can|From now on we] [share
  the {toy}|play with the {toy} together|take turns with the {toy}]." || @Then {hero} had an idea. {Hero.he} [gave|handed|held
  out] the {toy} to {friend}. "I am sorry. It is your turn now," {hero.he} @said[| @how].
/ @Friend_was_happy.
- They took turns, and @then both of them could {use}.
- @Fun.
- @Lesson. || @Lesson. @Close.

== alone in the dark
cast: child rabbit mouse bear kitten puppy squirrel hedgehog lamb dragon
morals: the dark is not so bad|things look scary only until you know them|being brave means to look twice|there is nothing to
    fear at night
/ {Hero} was @scared of [the dark|the night|noises in the night|monsters]. @Weather nights were the worst.
- One @weather night, {hero.he} [lay in bed|woke up|could not sleep|sat up in bed]. There was a [strange|loud|soft|scary|funny]
  [noise|sound] [under the bed|at the window|behind the door|in the closet|on the roof|in the hall]. [Scratch, scratch|Tap, tap,
  tap|Bump|Swish, swish|Creak|Thump, thump]!
- "[It is a monster|A ghost|It is coming to get me|Help|Go away]!" [cried|thought|whispered|shouted] {hero} and [hid under the
  blanket|pulled up the sheets|hugged {hero.his} pillow|shut {hero.his} eyes].
- {Hero.his} {family} came in with [a lamp|a candle|a lantern|a flashlight]. "What is it, {hero}?" {family.he} @asked[| @how].
- "[I heard a monster|There is something out there|Something wants to eat me]," @said {hero} in a [tiny|thin|small|shaky|low]
  voice.
/ "[Let us look together|Come, we will see|We will take a look]," @said {family.call}[| @how]. They [held hands|took a deep
  breath|tiptoed closer|counted to three] and looked.
- It was only {creature~guest.a}! It was @doing. || There sat {creature~guest.a}. It was @doing and looked @mood.
- {Hero} [laughed|giggled|had to laugh|let out a long breath]. "You are not a monster," {hero.he} @said[| to the {creature}].
  "You are just {creature.a}!"
- || {Hero} gave the {creature} [some|a bit of] [bread|milk|cake|water|apple|cheese|corn].
- {Family.call} [kissed|hugged|tucked in] {hero}. "[Sleep well|Good night|Sweet dreams], my brave {kind}," {family.he} @said[2*|
  @how].
- From then on, {hero} was not @scared at night. || The next night {hero} heard the noise again, but {hero.he} thought of the
  {creature} and [smiled|slept|went back to sleep].
- @Lesson.

== the lost baby
cast: child animal
morals: it is good to help those who are lost|a kind heart finds a way|small ones need our help|helping others makes you happy
/ @When, {hero} {kind.went} {place.to}. @Sky. || @When, {hero} was [playing|walking|resting] {place.in}. @Seen.
- {Spot}, {hero.he} [saw|found|heard] a [baby|tiny|lost|very small|young] {creature}. It was @sad and
  [wet|shaking|alone|cold|hungry].
- "[Why are you crying|What is wrong|Where is your home], little {creature}?" @asked {hero}[| @how]. || "[Oh|Hello]! [Who are
  you|What are you doing here], little one?" @asked {hero}.
- "I [lost|can not find] my [mother|mom|family]," [said|cried|sobbed|peeped] the {creature}. "We [came to see|wanted to see|were
  looking at] {sight}, and then I was [alone|all alone]."
- "[Do not cry|Do not worry|I will help you]," @said {hero}[| @how]. "We will find her."
/ First {hero} gave the {creature} {food.a}[| and @color.a @odds to hold|, and it ate every bit|, and it felt better]. || {Hero}
  [carried|took|led] the {creature} [on {hero.his} back|in {hero.his} arms|by the hand].
- They asked @mood.a @beast, but it [had not seen anything|only shook its head|did not know|was too busy to help]. || @Saw.
  "[Did you see|Have you seen|Do you know] the mother of this {creature}?" @asked {hero}. But the answer was no.
- Then {hero} [had an idea|remembered something|stopped]. "You wanted to see {sight}. [Maybe|Perhaps] your mother [is
  still|waits] there!"
- They {kind.went} to {sight}. And there was the big {creature}! She was [calling|crying|looking everywhere|@sad].
- "My baby!" she [cried|called|said]. The little {creature} [jumped into her arms|ran to her|was @very @happy]. || The two
  [hugged and hugged|cried with joy|kissed each other].
- "[Thank you|How can I thank you], kind {kind}," @said the mother[.|, and she gave {hero} {gift.a}.]
- @Hero_was_happy. @Lesson. || @Lesson. || @Lesson. @Bye.

== telling the truth
cast: child animal
morals: it is best to tell the truth|honest words mend what is broken|a friend will forgive you if you tell the truth|a lie
    makes everything heavier
/ @When, {hero} was at the [house|home] of [3*@mood.a {kind2}|{kind2.a}] named {friend}. {Friend} had {toy.a}. "[Be careful with
  {toy.it}|Please do not drop {toy.it}|{Toy.they} {toy.was} a present from my {family}]," @said {friend}[| @how].
- When {friend} [left the room|went out|was in the kitchen|was not looking], {hero} [took|picked up|grabbed] the {toy}.
  {Hero.he} [only |just |]wanted to {use}.
- [Crash|Snap|Crack|Oh no|Bang|Oops]! The {toy} {toy.was} [broken|ruined|in pieces|torn|bent].
- @Hero_was_scared. {Hero.he} hid the {toy} [under the bed|behind the curtain|under a rug|in a drawer|in a big pot|under a pile
  of @odds_many].
/ "Where {toy.is} my {toy}?" @asked {friend} when {friend.he} [came back|returned].
- "I do not know," @said {hero}[| @how]. "Maybe @beast.a took {toy.it}." || "[Maybe|Perhaps] @mood.a @beast [came and |]took
  {toy.it}," @said {hero}[| @how].
- {Friend} [looked everywhere|searched the whole house|looked high and low] and was @very @sad. {Hero} felt [sick|hot and
  cold|very small|bad about it|a stone in {hero.his} tummy].
- "[I have to tell you something|It was not true|I told a lie|I did a bad thing]," {hero} @said @finally. "I [broke|dropped] the
  {toy}. I wanted to {use}. I am so sorry."
- {Friend} was [quiet|silent|angry] for a [moment|while|minute]. Then {friend.he} said, "[Thank you for telling me|I am glad you
  told me|I forgive you|That was brave]."
/ Together they [fixed|mended|glued|repaired] the {toy} with [glue|tape|string|nails|a needle and thread|wire|paste] and a bit
  of @color [paint|paper|cloth|tape|wool]. || {Hero} {chore} for {friend} to make up for {toy.it}. || {Hero} gave {friend}
  {hero.his} own {toy2}[| and {gift.a}].
- @Fun. || @Hero_was_happy.
- @Lesson. || @Lesson. @Close.

== the surprise party
cast: child animal
morals: your friends never forget you|a surprise is worth the wait|good things are sometimes hidden|it is lovely to have friends
/ It was the birthday of {hero}. {Hero.he} was [six|seven|five|four|eight] years old [now|today|that day]. {Hero.he} hoped for
  {toy.a}, so that {hero.he} could {use}.
- But at breakfast {hero.his} {family} only said, "[Good morning|Eat up|Hurry up|Drink your milk]," and {chore}. || But
  {hero.his} {family} {chore} and [did not say a word|said nothing about it|did not look up].
- {Hero} [went to see|visited|looked for] [3*@mood.a {kind2}|{kind2.a}] named {friend}, {hero.his} best friend. "[I have no time
  today|I am busy|Not now, {hero}]," @said {friend}[| @how].
- "[They forgot my birthday|Nobody remembers me|Nobody thought of me]," thought {hero}. @Hero_was_sad.
/ {Hero} {kind.went} {place.to} and sat {spot}, all alone. || So {hero.he} {kind.went} {place.to}[| and looked at {sight}].
- @Saw. || @Sky, but {hero} did not care.
- When the @day was over, {hero} went home. It was [dark|quiet|strange|very still] inside. {Hero.he} opened the door.
- "Surprise!" [cried|shouted|called] {friend} and {hero.his} {family}. There were
  [balloons|candles|lanterns|flags|ribbons|streamers] and @color.a cake with
  [cherries|candles|stars|nuts|sprinkles|cream|roses].
- "[We did not forget|We would never forget you|We planned it all week]," @said {family.call}[| @how]. "[Happy birthday|Make a
  wish], {hero}!"
/ {Friend} gave {hero.him} a [big|round|long|heavy|square] box with @color.a [bow|ribbon|string]. In it {toy.was} {toy.a}! ||
  Then {hero} opened the presents. There {toy.was} {toy.a} from {friend}[| and {gift.a} from {hero.his} {family}].
- @Hero_was_happy. Now {hero.he} could {use}!
- @Fun. || They ate cake and played {game}. || They sang and danced.
- @Lesson.

== a slow learner
cast: child animal
morals: practice makes perfect|you can learn anything if you do not give up|every master was a beginner once|trying again is the
    secret
/ {Hero} wanted to learn to {skill}. {Skill.why}. || {Skill.why}, and {hero} [wanted|longed|hoped] to learn it: {hero.he} wanted
  to {skill}.
- On {weekday}, {hero.he} tried for the first time. {Skill.fail}. "[I can not do it|I will never learn it|It is too hard|I give
  up]," {hero.he} @said.
- @Then [3*@mood.a {kind2}|{kind2.a}] named {friend} [saw|heard|met] {hero.him}. "[I can teach you|I can help you|Do not give
  up|Try again]," @said {friend}[| @how]. "When I was [little|young|small], I could not {skill} either."
/ On {weekday2} they [worked|tried|practiced] [all @day|for an hour|again|until dark]. {Skill.fail2}. {Friend} [only
  smiled|clapped anyway|said it was better|was patient]. || On {weekday2}, {friend} showed {hero} how to do it. {Skill.fail2}.
  But it was [a little|much|a bit] better than on {weekday}.
- @Saw. It [laughed|stared|nodded|yawned], but {hero} did not care. || "[Once more|Again|Keep going|One more time]," @said
  {friend}[| @how].
- And on {weekday3}, [it worked|it happened|everything went right]! {Hero} could {skill}. "{Kind.cry}! [Look at me|I did it|I
  can do it|Did you see that]!" {hero.he} @said.
- @Hero_was_happy. {Friend} gave {hero.him} {gift.a}. || @Hero_was_happy. || {Hero.his} {family} [came to see it|could not
  believe it|clapped and clapped] and gave {hero.him} {gift.a}.
- @Lesson. || @Lesson. @Close.

== the picnic
cast: child animal
morals: a shared meal tastes best|there is enough when everyone shares|friends share what they have|a small lunch is big enough
    for two
/ @When, {hero} [wanted to have|planned|went on] a picnic {place.in}. @Bag.
- @Then {hero.he} met [3*@mood.a {kind2}|{kind2.a}] named {friend}, who [came along|wanted to come too|loved picnics]. || {Hero}
  [asked|invited] [3*@mood.a {kind2}|{kind2.a}] named {friend} to come along.
- They {kind.went} {place.to}. @Sky. || They sat down {spot}. From there they could see {sight}.
- But {friend} [looked @sad|did not eat|looked at {friend.his} feet|had an empty basket]. "I [forgot|dropped|lost] my lunch,"
  {friend.he} @said[| @how]. || But then @mood.a @beast [came|jumped out of the bushes|ran by] and [ate|took|stole|ran off with]
  the lunch of {friend}! "[Now I have nothing|My lunch is gone|I am so hungry]," {friend.he} @said.
- {Hero} [looked at|thought about|opened] {hero.his} basket. In it {food.was} {food.a} and {food2.a}. {Hero.he} was @very hungry.
- "[Here|Take this|Please], you can have the {food}," @said {hero}[| @how]. "I will eat the {food2}." || {Hero} gave the {food}
  to {friend} and kept the {food2}. "[We can share|Eat up|There is enough]," {hero.he} @said[| @how].
/ @Friend_was_happy. @Friend_thanks.
- || After lunch they looked at {sight2}. || @Saw.
- @Fun.
- @Lesson. || @Lesson. @Close.

== the race
cast: rabbit dog puppy pony fox boy girl turtle cat squirrel goat lion
morals: nobody likes a show-off|it is not important to win|helping a friend is better than winning|slow friends can be good
    friends
/ {Hero} was @very [fast|quick] and told everyone about it. "[I am the fastest {kind} in the world|Nobody can beat me|I always
  win]," {hero.he} @said every day.
- @When, there was a race {place.in}. The [prize|first prize] was {gift.a}. [3*@Mood.a {kind2}|{Kind2.a}] named {friend} [wanted
  to run too|was in the race too|came to race]. || @When, [3*@mood.a {kind2}|{kind2.a}] named {friend} said, "Let us race
  {place.in}. The [prize|winner's prize] is {gift.a}."
- "[You are too slow|You have no chance|You can not win], {friend}!" laughed {hero}. {Friend} [said nothing|only smiled|looked
  at the ground|was @sad].
- [One, two, three|Ready, steady], go! {Hero} {kind.went} [past {sight}|like the wind|as fast as {hero.he} could|far ahead]. ||
  @Mood.a @beast [blew a whistle|waved @color.a flag|rang a bell], and off they went.
- But near {sight2}, {hero} [fell over a root|slipped in the mud|tripped over a stone|stepped on a thorn|ran into a bush] and
  [hurt {hero.his} foot|could not get up|lay on the ground]. "[Ouch|Ow|Oh no]!" {hero.he} [cried|shouted|sobbed].
/ {Friend} [came|ran by|saw it|was close behind] and [stopped|did not run on|turned around]. "[Are you hurt|Let me help you|Lean
  on me], {hero}," {friend.he} @said[| @how].
- "But you [could win|could have won] the {gift}!" @said {hero}[| @how]. "[A friend is more important|I do not care|That does
  not matter|There will be other races]," @said {friend}[| @how].
- They [walked|went] over the line together[|, arm in arm|, side by side| and everybody clapped]. || {Friend} carried {hero}
  over the line.
- Both got {gift.a}. || {Hero} took the prize and gave the {gift} to {friend}. || They shared the {gift}.
- "I am sorry that I laughed at you," @said {hero}[| @how]. @Friend_was_happy.
- @Lesson. || @Lesson. @Close.

== the seed
cast: child animal
morals: good things take time|patience is rewarded|a little care makes things grow|you must wait for the best things
/ @When, {hero.his} {family} gave {hero} a [tiny|small|round|funny|strange] {color} seed. "[Plant it|Put it in the earth|Take
  good care of it], and you will get {plant.a}," {family.he} @said[| @how].
- {Hero} planted the seed [in @color.a pot|beside the fence|under the window|behind the house|near the well|in a corner of the
  garden]. Every @day {hero.he} gave it [water|a cup of water|water and sang to it].
- After one day, nothing [happened|grew|came up]. After [two|three|four|five] days, [still nothing|there was only mud|there was
  nothing]. "[I want my {plant} now|It does not grow|It is too slow]!" @said {hero}[| @how].
- {Hero} wanted to dig it up. "[Wait|Be patient|Stop|Do not dig]," @said {family.call}[| @how]. "[{Plant.a}|Every plant] needs
  [time|sun and rain|love and time|sleep]."
- So {hero} waited. {Hero.he} {chore} and played {game}. || So {hero} waited. @Saw. || So {hero} waited and {chore}.
/ Then it rained for [two|three|four|five] days. || Then the sun shone for [two|three|four|five] days. @Sky.
- One @weather @part, there was a [tiny|small|little|bright] green [leaf|shoot|tip|sprout]! "{Kind.cry}! [Look|Come quick|It is
  alive|It grows]!" @said {hero}[| @how].
- It grew [and grew|taller and taller|bigger every day|up to the window]. And soon it was {plant.a}[|, just as {family.call} had
  said].
- @Hero_was_happy. {Plant.end}. || {Plant.end}. @Hero_was_happy.
- || @Beast.a came to [see it|smell it|admire it].
- @Lesson. || @Lesson. @Bye.

== the new neighbor
cast: child animal
morals: a smile opens many doors|new friends are everywhere|it is easy to make friends if you say hello|shy hearts can be good
    friends
/ {Hero} was @very shy. @When, a new family moved in [next door|across the street|down the road|behind the hill]. They had
  @color.a [door|wagon|car|cart|truck|van|sofa] and many boxes with @odds_many.
- From [the window|behind a tree|the fence|the top of the stairs], {hero} saw {kind2.a}[| with @color.a @odds]. The {kind2}
  [played alone|looked @sad|sat on the steps|@did].
- {Hero} wanted to say hello, but [no word came out|{hero.his} knees shook|{hero.he} did not dare|{hero.his} voice was gone].
  {Hero.he} ran [home|inside|back].
- "[Everybody is shy sometimes|Just smile|Bring a little present|Just say your name]," @said {hero.his} {family}[| @how]. "Take
  {food.a} to the {kind2}."
/ So {hero} took {food.a} and knocked[| three times| very softly| at the door]. "[Hello|Hi|Good @day], I am {hero}. [This is for
  you|I brought you this]," {hero.he} whispered.
- "[How nice|How kind|Oh, thank you]! I am {friend}. I [love|like] {food.many}!" @said the {kind2}. "Do you [want to|like to]
  play {game}?"
- {Hero} [nodded|smiled|forgot to be shy|could not believe it]. "[Yes|Oh yes|Of course]! I [love|like] {game}!" {hero.he}
  @said[| @how]. || "{Kind.cry}! I play {game} all the time!" @said {hero}[| @how].
- They played {game} until [it got dark|dinner|the stars came out|bedtime]. || After {game} they played {game2} and ate the
  {food}. @Saw.
- || {Friend} gave {hero} {gift.a}. || "[Come back tomorrow|See you tomorrow|Now we are friends], {hero}!" @said {friend}[2*|
  @how].
- @Hero_was_happy. @Lesson. || @Lesson.

== the prank
cast: child animal
morals: nobody believes a liar|it is wrong to cry for help for fun|jokes should not scare others|if you trick others, they will
    not trust you
/ {Hero} loved to play tricks. @When, {hero.he} shouted, "Help! [There is|I see] {creature.a} {place.in}! [It wants to bite
  me|It is chasing me|It has big teeth|It looks mean]!"
- [3*@Mood.a {kind2}|{Kind2.a}] named {friend} [dropped {friend.his} {food}|stopped {friend.his} work|jumped up|left
  {friend.his} lunch] and {kind2.went} {place.to}. But there was no {creature}. {Hero} [laughed and laughed|rolled on the ground
  with laughter|held {hero.his} tummy and laughed]. "[I tricked you|It was only a joke|You should see your face]!" {hero.he}
  @said[| @how].
- "[That was not funny|Do not do that again|That was mean], {hero}," @said {friend}[| @how]. {Friend.he} [went home|walked
  away|shook {friend.his} head].
- The next day {hero} did it again. "Help! The {creature}!" And again {friend} came, and there was [nothing|only @mood.a @beast
  @doing|nobody].
/ [Then|But then|And then] one @weather @part, a real {creature} came {place.to}. It @creature_did. {Hero} was @very @scared.
  "Help! Help! {Creature.a}!" {hero.he} [shouted|cried|called].
- {Friend} [heard it|listened|looked up], but {friend.he} [thought|said], "[It is only a trick|That is another joke|I will not
  be fooled again]."
- {Hero} had to [climb a tree|hide {spot}|run and run|jump into a ditch] and [stay there until dark|wait for hours|lost
  {hero.his} @odds on the way].
- @Finally, the {creature} [went away|got bored|fell asleep|found something to eat]. {Hero} {kind.went} to {friend}. "I am sorry
  that I [lied|tricked you|fooled you]," {hero.he} @said[| @how]. "[I will never do it again|No more tricks|It was wrong]."
- {Friend} [hugged {hero.him}|forgave {hero.him}|shook {hero.his} hand|gave {hero.him} {gift.a}]. @Lesson. || @Lesson. @Close.

== a sick friend
cast: child animal
morals: a visit is the best medicine|it is good to care for the sick|a small gift can cure a lot|friends are there when you need
    them
/ {Hero} and [3*@mood.a {kind2}|{kind2.a}] named {friend} were best friends. Every {weekday} they played {game} together
  {place.in}.
- But one {weekday}, {friend} did not come. {Hero} waited {spot}. @Saw, but {friend} was not there.
- So {hero} {kind.went} to {friend}'s [house|home|door]. {Friend} was in bed with [a cold|a fever|a sore throat|a tummy ache|red
  spots|a bad cough|a broken leg|a toothache]. "[I can not come out|I feel so bad|I am sick]," {friend.he} @said in a
  [weak|hoarse|tiny|sad] voice. "[I will miss|I can not play] {game}."
- {Hero} [thought|wanted to help|went home and thought]. "What would make {friend} feel better?" {hero.he} asked {hero.his}
  {family}. "[Cook some|Make some] soup," @said {family.call}, "and bring {gift.a}."
/ {Hero} and {hero.his} {family} made soup with [carrots|beans|peas|leeks|noodles|rice|mushrooms|onions] and
  [salt|pepper|parsley|butter|garlic|love]. {Hero} carried it very [slowly|carefully]. @Saw[|, but {hero.he} did not stop].
- "[Here is soup|I made soup|This is for you], and {gift.a} too," @said {hero}[| @how]. || {Friend} ate the soup. Then {hero}
  gave {friend.him} {gift.a}.
- @Friend_was_happy. || {Hero} told {friend} about @mood.a @beast and @nice.a @odds, and {friend.he} laughed[| for the first
  time].
- [The next|A few days later on a @weather|One @weather] day, {friend} was well again. They went {place.to} and played {game}.
- @Friend_thanks. || @Hero_was_happy.
- @Lesson. || @Lesson. @Close.

== the trade
cast: child animal
morals: you should think before you trade|you miss what you gave away|old toys can be the best ones|new is not always better
/ {Hero} had {toy.a} and {hero.he} [often|always|really] liked to {use}. @When, [3*@mood.a {kind2}|{kind2.a}] named {friend}
  came by with {toy2.a}.
- "[What @nice.a {toy2}|Your {toy2} {toy2.is} so @nice|I like your {toy2}]!" @said {hero}[| @how]. "Do you want to [trade|swap]?
  You get my {toy}." {Friend} [nodded|said yes|shook {hero.his} hand|was @happy].
- {Hero} took the {toy2} home. || {Hero} showed the {toy2} to {hero.his} {family}.
- For [an hour|a day|two days|a while] {toy2.they} {toy2.was} [fun|exciting|wonderful]. @Saw.
- But then {hero} wanted to {use}. {Hero.he} [looked around|looked under the bed|opened the box], and [remembered|it came back
  to {hero.him}]: the {toy} {toy.was} [gone|with {friend}|not {hero.hers} anymore]. @Hero_was_sad.
/ {Hero} {kind.went} to {friend}. "[Can we trade back|May I have my {toy} back|Could we trade again], please?" {hero.he} @asked.
  "I miss my {toy}. I want to {use}."
- {Friend} [smiled|laughed|thought for a moment]. "[I miss my {toy2} too|Yes, I wanted to ask you the same|Of course, but first
  let us play {game}]," {friend.he} @said[| @how].
- So {hero} got the {toy} back and {friend} got the {toy2}. || They traded back, and {hero} [hugged|kissed|held] the {toy}.
- @Hero_was_happy. Now {hero.he} could {use} again. || @Hero_was_happy.
- @Fun. || @Saw, and they laughed.
- @Lesson. || @Lesson. @Close.

== the treasure map
cast: child animal
morals: a real treasure is a good friend|adventures are better together|clever eyes find what others miss|it pays to be curious
/ @When, {hero} found an old map [in a bottle|in a dusty book|under the stairs|in the attic|in a coat pocket|behind a picture].
  It showed {place.the} and [a big cross|@color.a cross|a big @color cross].
- {Hero} showed it to [3*@mood.a {kind2}|{kind2.a}] named {friend}. "[A treasure|It is a treasure map|There must be gold
  there]!" @said {friend}[| @how]. "[Let us go|Come on|We must find it]!"
- @Bag. || They took a shovel, @color.a @odds and {food.a}.
- @Saw. || @Seen. || @Sky.
- First they came to {sight}. "[The map says|It says here] [ten|twenty|fifty|seven] steps to {sight2}," @said {hero}[| @how].
  They [counted|walked] and [counted|hummed].
/ "The cross must be {spot}," @said {friend}[| @how]. They dug [and dug|a deep hole|with all their might], but there was only
  @nice.a @odds.
- "[Wait|Look]! The map was upside down," @said {hero}[| @how]. "The treasure is {spot2}!" || Then {hero} turned the map around.
  "[Not here|Oh no], it is {spot2}!" {hero.he} @said.
- And there, {spot2}, was a [small|heavy|rusty|wooden|big] chest. In it {toy.was} {toy.a}, @nice.a @odds and {gift.a}.
- "[I always wanted|I dreamed of] {toy.a}," @said {hero}[| @how]. "Now I can {use}!" "[Take {toy.it}|{Toy.they} {toy.is}
  yours|You have the {toy}]," @said {friend}[| @how]. "I will have the {gift}."
- @Hero_was_happy. || They {kind.went} home and told {hero.his} {family}.
- @Lesson. || @Lesson. @Close.

== stuck in the mud
cast: child animal
morals: together we are strong|many hands make light work|small helpers can make the difference|nobody is too small to help
/ After [a storm|the rain|a long rain|a week of rain], there was mud {place.in}. @When, {hero} heard a cry for help.
- {Spot}, {creature.a} was stuck in the mud. "[Get me out|Help me|Pull me out], please!" it @said. "I only wanted to see {sight}."
- {Hero} [took|grabbed|held] the {creature} by the [leg|hand|tail|ear] and pulled. It did not [move|work|help]. || {Hero} pulled
  as hard as {hero.he} could, but the {creature} did not move.
- [3*@Mood.a {kind2}|{Kind2.a}] named {friend} [came by|heard them]. "[I will help|Let me help|Hold on to me]," {friend.he}
  @said[| @how]. {Friend} pulled {hero}, and {hero} pulled the {creature}, but [it did not move|it was no use|the mud was too
  deep].
/ @Then @mood.a @beast and @mood.a @beast came to help too. || They called @mood.a @beast, who brought @nice.a @odds and a rope.
- But the {creature} was still stuck. "What can we do?" @asked {hero}.
- "[Can I help|May I try|May I pull too]?" @asked a tiny {kind3~small} named {helper}. "[You are too small|You]?" laughed
  {friend}. "[Everyone can help|Of course|Come]," @said {hero}[| @how].
- {Helper} took hold[| of the end], and they all pulled. [One, two, three|Pull, pull, pull|Heave, ho]! Plop! The {creature}
  [flew out|came out|was free].
- Everybody fell [into the mud|over|on the ground] and laughed. "[Thank you all|Thank you, {helper}|You saved me]," @said the
  {creature}. || "[Thank you all|You did it, {helper}|You are strong, {helper}]!" @said the {creature}, and gave {helper}
  {gift.a}.
- Then they went to see {sight} together. @Saw.
- @Lesson. || @Lesson. @Close.

== lost on the way home
cast: child animal
morals: it is good to ask for help|you should not go too far alone|it helps to stay calm when you are lost|you should look
    around you and remember the way
/ @When, {hero} {kind.went} {place.to}. "[Do not go too far|Stay on the path|Be home for dinner]," @said {hero.his} {family}[2*|
  @how]. @Bag.
- First {hero.he} came to {sight}. Then {hero.he} saw {sight2}.
- {Hero} followed {creature.a} [deeper and deeper|off the path|around a corner|over a fence|through a hedge]. @Then {hero.he}
  [stopped|looked around|turned around]. {Hero.he} did not know where {hero.he} was!
- "[Where is the path|Which way is home|Where am I]?" {hero.he} [said|asked|whispered]. @Hero_was_scared. || @Hero_was_sad.
/ [3*@Mood.a {kind2}|{Kind2.a}] named {friend} [sat by the road|came along|looked out of a hole|was gathering wood]. "[Are you
  lost|Can I help you|Where do you live]?" @asked {friend}.
- "[I want to go home|I can not find the way home|My {family} waits for me]," @said {hero}[| @how]. "[What did you see on the
  way|What did you see first|Can you tell me what you saw]?" @asked {friend}.
- {Hero} thought. "First I saw {sight}, and then {sight2}," {hero.he} @said[| @how].
- "[Then it is easy|Very good|I know the way]," @said {friend}[| @how]. "We must go back to {sight2} first, and then to {sight}."
- They [walked|went] to {sight2}, and on to {sight}. {Hero} could see the [roof|smoke|light|door|garden] of {hero.his} home!
- @Thanks. {Hero} gave {friend} {food.a}[| and {gift.a}].
- {Hero.his} {family} [hugged {hero.him}|ran to meet {hero.him}|was @very @happy|had been worried].
- @Lesson. || @Lesson. @Bye.

== the greedy wish
cast: child animal
morals: you should be happy with what you have|too much of a good thing is bad|greed makes nobody happy|you should be careful
    what you wish for
/ @When, {hero} found a [magic|strange|glowing|golden|tiny] [stone|lamp|ring|shell|coin|feather] {place.in}. @Wow! A
  [fairy|genie|tiny wizard|talking fish|little elf] came out of it.
- "You have [three|two|four] wishes," it said[| @how]. "[Choose well|Think before you speak|Be quick|Use them wisely]!"
- "I wish for {food.a}," @said {hero}[| @how]. [Poof|Pling|Whoosh|Zing]! There {food.was} {food.a}. || First {hero} wished for
  {food.a}. [Poof|Pling|Whoosh|Zing]! There {food.was} {food.a} on @color.a plate.
- "[More|I want more|Much more]! I wish that everything I touch turns into {food.many}!" cried {hero}.
- {Hero} touched @color.a @odds, and it turned into {food.many}. {Hero} touched @color.a @odds, and it turned into {food.many}
  too. || {Hero} touched @nice.a @odds. It turned into {food.many}! Then {hero.he} touched @color.a @odds. More {food.many}!
/ But when {hero} wanted to eat dinner, the plate turned into {food.many}. When {hero.he} hugged {hero.his} {family},
  {family.he} turned into {food.many}! || Then {hero} touched {hero.his} bed, and it turned into {food.many}. And when {hero.he}
  took the hand of {hero.his} {family}, {family.he} turned into {food.many}!
- @Hero_was_sad. "[Oh no|Please], [I do not want any more|I am tired of|take back the] {food.many}! I want my {family}!"
- "[Is that your last wish|Are you sure|Do you wish that]?" @asked the little voice. "[Yes|Oh yes|Yes, please]!"
  [cried|shouted|said] {hero}.
- [Poof|Pling|Whoosh|Zing]! {Hero.his} {family} was back, and the {food.many} were gone. || [Poof|Pling|Whoosh|Zing]! Everything
  was [as before|fine again|normal again]. "[Why do you look at me like that|Why do you cry|What is wrong]?" said
  {family.call}[| @how].
- {Hero} hugged {family.him}[| and did not let go| for a long time]. @Hero_was_happy. || @Hero_was_happy.
- || {Hero} did not eat {food.many} again for a [year|month|week|long time].
- @Lesson. || @Lesson. @Bye.

== the broken friendship
cast: child animal
morals: a good friend says sorry|words can hurt|it is wrong to laugh at others|what is different can be beautiful
/ [3*@Mood.a {kind2}|{Kind2.a}] named {friend} came {place.to} with a new {tool3}. It was {color2} with {color3}
  [dots|stripes|stars|buttons|lace|flowers]. {Friend} was @very proud of it.
- "[Ha ha|Look at that|Hee hee]! {Color2} with {color3}! [How silly|That looks funny|That is so ugly|You look like
  {creature.a}]!" laughed {hero}. [Everyone|The others|Two @beast_many|A passing @beast] laughed too.
- {Friend} [turned red|said nothing|looked at the ground] and [ran away|hid {spot}|went home].
- At first {hero} [felt big|thought it was funny|played on]. But then {hero.he} [saw|heard] {friend} [cry|weep|sob] {spot}.
  {Hero.his} heart [hurt|felt heavy|sank].
- "[Why did I say that|What have I done|Was that mean of me]?" {hero.he} asked {hero.his} {family}. "[You can say sorry|It is
  never too late|Words can also heal]," @said {family.call}[| @how].
/ All evening, {hero} [worked|sewed|painted|knitted|drew]. The next day {hero.he} came with {tool3.a} that was {color2} with
  {color3} too! || The next day, {hero} brought {gift.a}, wrapped in {color2} paper with {color3.a} ribbon.
- "I am sorry, {friend}," @said {hero}[| @how]. "[I like {color2} with {color3} now|It was wrong to laugh|I was mean to you].
  [Can we be friends again|Will you forgive me|Are you still sad]?"
- {Friend} [smiled|thought for a moment|wiped {friend.his} eyes]. "[Yes|Of course|I forgive you]," {friend.he} @said[| @how].
- @Friend_was_happy. || @Saw, and they both laughed, but not at @odds_many.
- @Fun. || @Hero_was_happy.
- @Lesson. || @Lesson. @Close.

== the kite in the tree
cast: child
morals: you should ask for help when you need it|everyone is good at something|friends can do what you can not|a small friend
    can do great things
/ {Hero} had {color2.a} kite[| with a long tail| from {hero.his} {family}]. @When, {hero.he} {kind.went} {place.to} to fly it.
  @Sky.
- The kite went [up and up|higher and higher|above the roofs|round and round]. @Saw.
- @Suddenly, the wind [turned|blew hard|howled], and the {color2} kite got stuck [in a tall tree|on a roof|on a chimney|on a
  pole]!
- {Hero} [jumped|pulled the string|climbed up|threw a stick], but {hero.he} could not [reach it|get it|free it]. {Hero.he} threw
  @odds.a at it, but now that was stuck too. || {Hero} asked @mood.a @beast, but it was [too short|too heavy|too scared|too
  lazy].
- @Hero_was_sad.
/ {Kind2~flyer.a} named {friend} [landed|sat down|stopped] next to {hero.him}. "[What is the matter|Why are you sad|What
  happened]?" @asked {friend}.
- "My {color2} kite is stuck up there," @said {hero}[| @how]. "[I can not fly|I am too small|I have no wings]."
- "But I [can|have wings]!" @said {friend}[| @how]. {Friend.he} [flew up|spread {friend.his} wings|flapped {friend.his} wings]
  and [untied|pulled|bit through] the string.
- The kite [came down|floated down|fell] and landed {spot}. "{Kind.cry}!" [cried|shouted] {hero}. @Thanks.
- {Hero} gave {friend} {gift.a} and {food.a}. || {Hero} tied @color.a ribbon around {friend}'s neck.
- After that {hero} flew the {color2} kite and {friend} flew beside it[| until the sun went down| over the roofs| in circles].
  @Hero_was_happy.
- @Lesson. || @Lesson. @Close.

== the new baby
cast: child animal
morals: love grows when there are more to share it|a family has room for everyone|big ones can help little ones|there is enough
    love for all
/ There was a new baby in the family of {hero}. It was a little [sister|brother|cousin] with {color2}
  [eyes|socks|blankets|mittens]. All @day, {hero.his} {family} [sang to the baby|carried the baby|fed the baby|washed the baby].
- "[Can you play|Will you play|Do you want to play] {game} with me?" @asked {hero}. "[Not now|Later|I have no time], {hero}. The
  baby [cries|is hungry|is wet|needs sleep]," @said {family.call}[| @how].
- @Hero_was_sad. "[Nobody loves me anymore|They only love the baby|I wish the baby was gone]," {hero.he} [thought|said|whispered].
- {Hero.he} [packed {hero.his} bag|hid in the closet|went outside|sat under the table]. @Saw. || @Bag. {Hero.he} wanted to run
  away.
/ @Then the baby began to cry. {Family} rocked it, but it cried. {Family} gave it milk, but it [cried|screamed] even louder. ||
  @Then {hero.he} heard the baby. It cried and cried, and nothing helped: no milk, no song, no @color @odds.
- {Hero} [came closer|peeked in|went to the crib]. {Hero.he} made a funny face like @mood.a @beast. The baby [stopped|looked
  up|was quiet]. Then {hero.he} [hummed|danced|wiggled {hero.his} ears] like @mood.a @beast, and the baby laughed!
- "[You are the best|The baby loves you|How did you do that|I need you], {hero}!" @said {family.call}[| @how]. "Only you can
  make it laugh. [Now|Come,] let us play {game}."
- {Hero} and {hero.his} {family} played {game} while the baby [slept|watched|laughed|chewed on @odds.a]. @Hero_was_happy.
- || Later {hero} gave the baby {gift.a}.
- @Lesson. || @Lesson. @Bye.

== the friendly giant
cast: child rabbit mouse frog squirrel duck lamb kitten hedgehog
morals: you should not judge others by their looks|big ones can be gentle|a scary face can hide a kind heart|you must get to
    know someone first
/ Everyone was @scared of {kind2~giant.a} who lived {place.in}. "[It eats|It bites|It hates] little ones like you,"
  [they|people|the neighbors] said. But {hero} wanted to see {sight}.
- @When, {hero} {kind.went} {place.to}. @Saw.
- @Suddenly, the {kind2} [stood there|came out|looked up] {spot}! It was as big as a [house|barn|hill|bus|church].
  @Hero_was_scared.
- "[Please do not eat me|Do not hurt me|I am too small to eat]!" [cried|said|whispered] {hero}.
- "[Eat you|Hurt you]? I only eat {meal.many}," @said the {kind2}[| @how]. "[Everybody runs away from me|Nobody ever talks to
  me|I have no friends]. My name is {friend}."
/ {Hero} [looked up and saw|saw] that {friend} was crying. || Then {hero} saw that {friend} had a thorn in {friend.his}
  [foot|paw|nose|tail]. {Hero.he} pulled it out.
- "[I will be your friend|Do not be sad|I like you], {friend}," @said {hero}[| @how]. "[Do you want to play|Can you play|Let us
  play] {game}?"
- They played {game}, and {friend} [lost on purpose|was very careful|laughed like thunder]. Then {friend} carried {hero} on
  {friend.his} back to {sight}. || {Friend} carried {hero} to {sight}, and there they played {game}.
- {Hero} told {hero.his} {family} about {friend}. "[The {kind2} is kind|It only eats {meal.many}|We played {game}]!" {hero.he}
  @said[| @how]. The next day, [everyone|the whole town|all the neighbors] came {place.to} with {meal.many} and {gift.a}.
- @Friend_was_happy.
- @Lesson. || @Lesson. @Close.

== shelter from the storm
cast: child animal
morals: there is always room for one more|a warm home is for sharing|kindness comes back to you|nobody should be cold and alone
/ @When, a storm came. The [rain|hail|wind|snow] [beat on|rattled|shook] the [windows|roof|door|shutters], and the [thunder was
  loud|night was black|sky was dark|trees groaned]. {Hero} [sat by the fire|was snug in bed|drank hot cocoa|ate {food.a}] with
  {hero.his} {family}.
- [Knock, knock, knock|Bang, bang|Tap, tap]! {Hero} opened the door. There stood @mood.a {kind2} with @nice.a @odds. "[My home
  is under water|The wind took my roof|A tree fell on my house|I lost my way]," @said the {kind2}. "[May I come in|Can I stay
  here|Do you have room for me]?"
- "[There is little room|It is a small house|The bed is narrow]," @said {family.call}, "but [come in|you are welcome|sit by the
  fire]." || "[Come in|Quick, come in|Of course], [you are all wet|you must be cold|sit by the fire]!" @said {hero}[| @how].
- The {kind2} was called {friend}. {Hero} gave {friend.him} @color.a [towel|blanket|sweater|coat] and {food.a}. @Saw.
/ @Then there was another knock. It was @mood.a @beast with @color.a @odds. "[Come in|There is room|Sit down] too!" @said
  {friend} and {hero}[|, and they moved closer].
- All night they [told stories|sang|played {game}|played {game} and {game2}] while the storm [roared|howled|raged]. || They
  played {game} and told stories about @mood.a @beast and @nice.a @odds.
- In the morning the sun [came out|was shining]. "[Thank you|I will never forget this], {hero}," @said {friend}, and gave
  {hero.him} {gift.a}.
- || The next {weekday}, the roof of {hero} [leaked|broke|flew away], and who came to help? It was {friend}!
- @Hero_was_happy. || @Lesson. || @Lesson. @Bye.

== the painting
cast: child animal
morals: you should do it in your own way|mistakes can become something beautiful|it is fun to make things with your own
    hands|there is no wrong way to paint
/ @When, {hero} painted a picture for {hero.his} {family}. {Hero.he} painted {creature.a} in {color2} and a
  [house|boat|tree|castle|bridge|tower] in {color3}. Behind it there was @mood.a @beast with @nice.a @odds.
- {Hero} worked [all @day|for hours|very hard|with {hero.his} tongue out]. @Sky. || {Hero} worked [all @day|for hours|very
  hard|with {hero.his} tongue out].
- @Suddenly, [a jar of {color4} paint fell over|{color4} paint dripped down|a brush with {color4} paint slipped|@mood.a @beast
  stepped into the {color4} paint]! Now there was a big {color4} [spot|stripe|splash|stain] on the {creature}.
- "[Oh no|It is ruined|Now it is ugly|All that work for nothing]!" {hero} [cried|said|shouted]. @Hero_was_sad.
/ [3*@Mood.a {kind2}|{Kind2.a}] named {friend} looked at the {color4} paint. "[Wait|Look again|Do not throw it away]," @said
  {friend}[| @how]. "[It could be|It looks like|Make it into] [a hat|a cloud|an umbrella|a cape|a flower|a balloon|wings|the
  moon]!"
- {Hero} [thought|smiled|took the brush]. {Hero.he} added @color.a [line|dot|circle|edge] here and @color.a [line|dot|star|tail]
  there. || {Hero} took some @color paint and some @color paint and painted [all night|on|with a smile|very slowly].
- Now the {color2} {creature} looked [wonderful|much better|very special|better than before].
- {Hero.his} {family} loved it. "[What a fine {creature}|I like the {color4} best|I never saw such {creature.a}|You are an
  artist]!" {family.he} @said, and hung it [over the fire|in the hall|in the kitchen|on the door].
- @Thanks. || {Hero} gave {friend} {gift.a}.
- @Hero_was_happy. @Lesson. || @Lesson. || @Lesson. @Close.

== the jar
cast: child
morals: wild things should be free|to love something is to let it go|it is not right to lock up a friend|every creature needs
    its home
/ @When, {hero} caught {bug.a} {place.in}. It was {color2} and @nice, and it had been sitting {spot}. {Hero} put it in a jar
  with [leaves|grass|a twig|holes in the lid] and took it home.
- "[Look what I have|Look], {family.call}!" {hero.he} @said. "[It is mine|I will keep it forever|I will teach it tricks]!" ||
  {Hero} showed it to {hero.his} {family}.
- The first day, the {bug} [looked for a way out|crawled up the glass|looked out|made little sounds].
- But the second day, the {bug} [did not move|did not eat|sat still|was quiet]. It did not look so {color2} anymore.
  @Hero_was_sad.
/ "Why is my {bug} so [sad|still|quiet]?" {hero} asked {hero.his} {family}. "[How would you feel in a jar|Would you not miss
  your home|Do you think that it wants to go home]?" said {family.call}[| @how]. "[Where did it live|Where did you find it|Do
  you remember where it came from]?"
- {Hero} thought about {sight} {place.in}. {Hero.he} [took|carried|brought] the jar back {place.to} and put it down {spot}. @Saw.
- {Hero} opened the lid. "[Goodbye|Go home|Farewell], little {bug}," {hero.he} [whispered|said]. The {bug} [waited|turned
  around|shook itself], and then it [was gone|went home|left].
- @Hero_was_happy. || {Hero} felt [good|right|light].
- The next @day {hero} [came back|looked] {spot}. There was the {color2} {bug} with [two|three|four|five] others! || {Hero.his}
  {family} gave {hero.him} {gift.a}.
- @Lesson. || @Lesson. @Bye.

== too much salt
cast: child animal
morals: you should read the recipe first|you should do one thing at a time|cooking is more fun together|it is all right to make
    mistakes
/ It was the birthday of {hero}'s {family}. {Hero} wanted to [bake|cook] {dish.a} for {family.him}. [3*@Mood.a
  {kind2}|{Kind2.a}] named {friend} came to help. || @When, {hero} and @mood.a {kind2} named {friend} wanted to surprise
  {hero}'s {family} with {dish.a}.
- "[We need|First we need|I have] {stuff}, {stuff2} and {stuff3}," @said {hero}[| @how]. They put on @color aprons[| and @color
  hats].
- {Friend} [mixed|weighed|washed] the {stuff}, and {hero} [stirred|added|took] the {stuff2}. @Sky.
- @Then they began to [play {game}|tell jokes|talk about @mood.a @beast], and {hero} did not look. {Hero.he} put in [five
  spoons|a whole cup|a big bowl|two pounds] of [salt|pepper|mustard|chili|vinegar]!
- They tasted it. "[Yuck|Ugh|Oh no|Pfui]! It [tastes like|is like] [the sea|old socks|fire|soap|mud|a wet @beast]!" @said
  {friend}[| @how]. @Hero_was_sad.
/ "[We can start again|Let us try again|It was only a mistake]," @said {friend}[| @how]. But now they had no more {stuff3}.
  {Hero} {kind.went} to the [shop|market|neighbor] and got {stuff3}[| and @nice.a @odds]. @Saw.
- This time they [read the recipe|did not play|watched the spoon|were careful]: {stuff}, {stuff2}, {stuff3}, and only a
  [pinch|bit|spoon] of salt.
- The {dish} [came out of the oven|was done|smelled wonderful]. They put @color [candles|cherries|stars|flowers] on it.
- "[For me|What a surprise|How lovely]! {Dish.a} with {stuff3}!" @said {hero}'s {family}. "[It is the best I ever had|It tastes
  wonderful|Thank you, my dears]!"
- {Family.he} gave {hero} and {friend} {gift.a}. || @Fun. || @Hero_was_happy.
- @Lesson.

== the snow friend
cast: child penguin bear fox dog puppy rabbit
morals: even short friendships are worth it|good things come back|memories stay in the heart|winter always returns
/ In the night it had snowed. {Hero} {kind.went} [outside|into the garden|out the door] and [rolled|made|pushed] [a ball|three
  balls] of snow. @Sky.
- {Hero.he} made it into @nice.a snow @snowman. It had {color2.a} hat, {color3.a} scarf, [eyes of coal|button eyes|eyes of
  stone] and @color.a [carrot|cork|cone|spoon] for a nose.
- "[I will call you|Your name is|You must be|You are] {odd_name}," @said {hero}[| @how]. {Hero.he} told it about @mood.a @beast
  and about @odds_many.
- @Saw. Even {odd_name} seemed to smile.
- But then the days grew warm. {Odd_name} got [smaller|thinner|shorter] and [smaller|thinner|shorter]. "[Do not go|Please
  stay|Do not melt], {odd_name}!" cried {hero}.
- One morning, only {color2.a} hat and {color3.a} scarf lay in a puddle. @Hero_was_sad.
/ "[Where did {odd_name} go|Is {odd_name} gone forever|Why did {odd_name} leave]?" {hero} asked {hero.his} {family}.
- "[{Odd_name} is in the river now|{Odd_name} is water now, and waters the flowers|{Odd_name} went up to the clouds]," @said
  {family.call}, "and [next winter|when it is cold again] {odd_name} will fall from the sky."
- {Hero} put the {color2} hat and the {color3} scarf [in a box|in a drawer|under {hero.his} bed].
- Then the first [snow|flake] fell. {Hero} [took|got] the {color2} hat and the {color3} scarf and {kind.went} outside.
  "[Hello|Welcome back|There you are], {odd_name}!" {hero.he} @said.
- @Hero_was_happy. || @Lesson. || @Lesson. @Bye.

== the helper in the night
cast: child animal
morals: it is good to do kind things in secret|a good deed needs no name|giving is its own joy|you can help without being asked
/ Old [Mr.|Mrs.] {surname} lived alone [near|beside] the {landmark}. @When, {hero} saw that the old [house|cottage] looked @sad:
  [the fence was broken|the garden was full of weeds|the door had lost its paint|there was no firewood].
- "[Poor old|Dear old] {surname} can not do it alone," {hero} told [3*@mood.a {kind2}|{kind2.a}] named {friend}. "[Let us
  help|We could help] in secret!" || {Hero} met @mood.a {kind2} named {friend}. "[Let us help old|We should help old]
  {surname}," @said {hero}, "but nobody must know."
- That night they took a lantern, @color.a @odds and {food.a}. They went to the {landmark} on tiptoe. @Saw.
- {Hero} {chore}, and {friend} {chore2}. || While {friend} {chore}, {hero} {chore2}. "Shh!" @said {hero}, when @mood.a @beast
  [sneezed|coughed|barked|yawned|fell over|knocked over a bucket].
- On the doorstep they left {gift.a} and @nice.a @odds.
/ In the morning, {surname} opened the door. "[Who did this|What is this|Am I dreaming]? Somebody {chore} and {chore2}! And
  there is {gift.a}!" || In the morning there was a cry at the {landmark}. "[Look|My goodness]! Somebody {chore}! Somebody
  {chore2}!"
- "[Was it you|Do you know who it was], {hero}?" @asked {surname}. {Hero} [winked at|looked at|smiled at] {friend} and said,
  "[Maybe it was|It must have been|Perhaps it was] @mood.a @beast."
- {Surname} [laughed|winked|nodded] and gave them {food2.a}. || {Surname} was so @happy that everyone got {food2.a}.
- @Hero_was_happy. || @Hero_was_happy. @Fun.
- @Lesson. || @Lesson. @Close.

== the music band
cast: child animal
morals: music is better together|every voice matters|different sounds make the best song|you should not be afraid to be heard
/ {Hero} loved music and could play the {instrument}. @When, {hero.he} [heard|read|saw on a sign] that there would be a concert
  {place.in} on {weekday}. "[I want to play there|We need a band|I will make a band]!" {hero.he} @said.
- {Hero.he} asked @mood.a {kind2} named {friend}. "I can play the {instrument2}," @said {friend}[| @how]. They asked @mood.a
  {kind3} named {helper}. "I only have @nice.a {tool3}," @said {helper}[| @how].
- "[That makes a fine sound|You can tap on it|That is just what we need]!" @said {hero}[| @how]. They practiced {spot}. @Saw.
- At first it sounded like @mood.a @beast @doing. "[Again|Once more|Softer|Slower]!" @said {hero}[| @how]. They practiced [all
  week|until dark|every day].
/ On {weekday}, everybody came {place.to}, even @mood.a @beast and @mood.a @beast. {Helper} [looked out|saw them] and
  [shook|turned pale|wanted to hide]. "[I am scared|I can not do it|There are so many]," {helper.he} @said.
- "[We are with you|Just look at me|We do it together], {helper}," @said {hero}[| @how]. || {Friend} gave {helper} {gift.a} for
  luck. "[You can do it|Be brave]," @said {friend}[| @how].
- {Hero} played the {instrument}, {friend} played the {instrument2}, and {helper} [tapped|banged|shook] the {tool3}. It was
  [wonderful|so pretty|loud and happy|like magic].
- [Everybody|The crowd|The whole place] [clapped|danced|cheered|stood up]. @Mood.a @beast threw @color
  [roses|ribbons|hats|flowers]. || "[More|Bravo|Again]!" shouted the [crowd|people|children].
- "[We did it|What a day|I was brave]!" @said {helper}[| @how]. @Hero_was_happy.
- @Lesson. || @Lesson. @Close.

== the night in a tent
cast: child animal
morals: the world is big and beautiful|friends make the dark bright|the stars belong to everyone|home is never far when a friend
    is near
/ @When, {hero} and @mood.a {kind2} named {friend} wanted to sleep in a tent {place.in}. @Bag.
- They put up the {color2} tent {spot}.
- For supper they had {food.a} and {food2.a}. When it was dark, {friend} told a story about @mood.a @beast with @nice.a @odds.
- @Suddenly, there was a [rustle|crack|howl|splash|growl] {spot2}. "[What was that|Did you hear that|Who is there]?" whispered
  {friend}. @Hero_was_scared.
/ {Hero} took [the lantern|a stick|a deep breath|the flashlight] and {kind.went} out of the {color2} tent. || "[I will look|Stay
  here|Let us go and see]," @said {hero}, and {hero.he} crept out of the {color2} tent.
- {Spot2} sat {creature.a}! It had [found|eaten|smelled|stolen] the {food}. It looked @mood and @scared too.
- "[It was only|It is just] {creature.a}, {friend}!" @said {hero}[| @how]. "[It is hungry|It only wants to eat|It likes the
  {food}]." They gave it the {food2}, too.
- The {creature} [lay down|slept|stayed] in front of the tent[| all night| until morning]. || Then the {creature} and the two
  friends looked at the stars and saw one that looked like @nice.a @odds.
- "[I am not scared anymore|Good night|This is the best night of all]," @said {friend}[| @how]. @Friend_was_happy.
- In the morning {hero} told {hero.his} {family} about the {creature}[.|, and {family.he} gave {hero.him} {gift.a}.]
- @Lesson. || @Lesson. The end.

== the messy room
cast: child mouse rabbit monkey pig bear kitten puppy
morals: a tidy room saves time|everything has its place|it is best to clean up right away|a clean room makes a clear head
/ The room of {hero} was a mess. There were {mess} on the floor, {mess2} on the bed, and @color.a @odds hung from the lamp.
  "[Clean up your room|Please tidy up|What a mess], {hero}," @said {hero.his} {family}[| @how]. "[Later|Tomorrow|I like it this
  way|Not now]," @said {hero}[| @how].
- @When, [3*@mood.a {kind2}|{kind2.a}] named {friend} [called|knocked|came]. "[Come to|Let us go to|Hurry up, there is a party
  at] the {landmark}! [Bring|Do not forget] your {toy}. We want to {use}."
- {Hero} looked for the {toy}. {Hero.he} found @color.a @odds, @nice.a @odds and half a sandwich, but no {toy}.
- "[I can not wait|I must go now|It is late], {hero}," @said {friend}[| @how], and {friend.he} went to the {landmark} alone.
  @Hero_was_sad.
/ "[I will help you|Let us do it together|There is only one way]," @said {hero.his} {family}[| @how]. {Hero} [put away|picked
  up|sorted] the {mess} and {chore}. {Family} [put away|picked up|sorted] the {mess2} and {chore2}.
- @Finally, there {toy.was} the {toy}, [under|behind|between] the [pillows|coats|dirty socks|old papers|blankets]! || They
  worked for [an hour|two hours|a long time]. And in the last [corner|box|drawer] {toy.was} the {toy}!
- {Hero} {kind.went} to the {landmark}[| as fast as {hero.he} could]. "[I found {toy.it}|Here {toy.they} {toy.is}|I am here],
  {friend}!" {hero.he} @said. Now they could {use}.
- @Hero_was_happy. || @Hero_was_happy. @Fun.
- @Lesson.

== the long letter
cast: child animal
morals: a letter can cross any distance|far away is not forgotten|true friends stay friends|distance can not break a friendship
/ [3*@Mood.a {kind2}|{Kind2.a}] named {friend} was the best friend of {hero}. They always played {game} {place.in}. But @when
  {friend} moved to {land}, far away.
- On the last day, {friend} gave {hero} {gift.a}. "[Do not forget me|I will miss you|Write to me], {hero}," {friend.he} @said[|
  @how]. @Hero_was_sad.
- Without {friend}, {game} was no fun. {Hero} sat {spot} and looked at {sight}.
- So {hero} took @color paper and @color.a pen.
/ "Dear {friend}, today I saw @mood.a @beast @doing. I ate {food.a} and {chore}. [I miss you.|Nobody plays {game} like you.|Do
  you still play {game}?] [Your friend|Love], {hero}," {hero.he} wrote. {Hero.he} put in @nice.a
  [feather|leaf|stamp|ribbon|picture|shell|flower], too.
- The mail took the letter over [the mountains|the sea|seven rivers|the desert|the big forest]. {Hero} waited
  [one|two|three|four|five] weeks.
- Then an answer came! "Dear {hero}, in {land} everything is {color2}. The neighbor is @mood.a @beast. Nobody plays {game} here.
  I still think of {sight}, and of us {spot}. Come and visit me! [Your friend|Love], {friend}."
- In the summer, {hero} took the train to {land}. {Friend} stood at the station with @nice.a @odds.
- @Lesson.

== the lost purse
cast: child animal
morals: you should give back what is not yours|honest people sleep well|it is right to return what you find|being honest is
    worth more than gold
/ @When, {hero} found {color2.a} purse {place.in}, {spot}. In it there were [ten|twenty|thirty|fifty|a hundred] coins, @color.a
  @odds and a picture of {creature.a}. There was [no name|no one near|nobody around].
- "[With this I can buy|Now I can have] {toy.a}," thought {hero}. "Then I could {use}!"
- But then {hero.he} thought, "[Somebody misses this|Somebody will be sad|It is not mine]." || "[Somebody misses it|It is not
  yours|Think of who lost it]," @said {hero.his} {family}[| @how].
- {Hero} asked @mood.a @beast, but it [had lost nothing|had lost only @color.a @odds|shook its head]. {Hero} asked @mood.a
  @beast, but it [did not need a purse|had no pockets|was @doing].
/ Then {hero} saw @mood.a {kind2} who was [looking at the ground|looking under every stone|crying|running up and down]. "[Did
  you lose something|What are you looking for|Can I help you]?" {hero.he} @asked.
- "[I lost my purse|My purse is gone]!" [said|sobbed] the {kind2}. "[It must be|I think I lost it] near {sight}." "[What color
  was it|What does it look like]?" @asked {hero}. "It is {color2}, and there is a picture of {creature.a} in it."
- "[Then it is yours|Here it is|I found it]!" @said {hero}[| @how]. "It was {spot}."
- The {kind2} [took|opened|kissed] the {color2} purse. "[You are so honest|How can I thank you|You are a good {kind}]! My name
  is {friend}," {friend.he} @said[| @how]. "The {creature} is my [first|old|dear] pet."
- {Friend} gave {hero} {gift.a} and {food.a}. || {Friend} gave {hero} [two|three|five] coins, and {hero.he} bought {food.a} for
  them both. || @Friend_was_happy. {Friend} took {hero} home and gave {hero.him} {food.a}.
- @Hero_was_happy. || @Lesson. || @Lesson. @Bye.

== the bridge
cast: child animal
morals: working together is better than fighting|two can do what one can not|it is silly to fight|a quarrel helps nobody
/ {Hero} and @mood.a {kind2} named {friend} lived on two sides of a river. @When, they met in the middle of the narrow bridge.
  {Hero} carried {food.a}, and {friend} carried @color.a {tool3}.
- "[Let me pass|Go back|I was here first]!" @said {hero}[| @how]. "No, [you go back|let me pass|I was here first]!" @said
  {friend}[| @how]. They pushed and [pushed|shouted|stamped their feet].
- Crack! The bridge broke, and {hero} and {friend} fell into the [cold|deep|muddy|wild|dark] water.
- The {food} and the {tool3} [floated away|were gone|sank]. They [climbed out|sat on a stone|crept to the shore], wet as
  @beast_many. @Hero_was_sad.
/ "[It was my fault|I am sorry|That was silly of me]," @said {hero}[| @how]. "[No, it was mine|Me too|We were both silly],"
  @said {friend}[| @how].
- "We need a bridge," @said {hero}[| @how]. "You want to visit the {landmark}, and I want to visit the {landmark2}." "Then [let
  us build one|we build a new one|come], but a wide one!" @said {friend}[| @how].
- {Hero} brought [planks|logs|stones|ropes] and {friend} brought [nails|hammers|branches|vines]. @Mood.a @beast brought @nice.a
  @odds.
- They painted the new bridge {color2}.
- Then {hero} went to the {landmark2} and {friend} went to the {landmark}. On the way back they met on the {color2} bridge and
  [laughed|shook hands|shared {food2.a}].
- @Lesson. || @Lesson. @Close.

== no sleep
cast: child animal
morals: sleep comes when you stop chasing it|quiet thoughts bring sleep|home is the best place to sleep|everyone needs rest
/ One @weather night, {hero} could not sleep. {Hero.he} [lay on the left side|turned around|stood on {hero.his} head|counted the
  cracks in the wall], and [lay on the right side|sang a song|counted the stars|fluffed the pillow]. [Nothing helped|It was no
  use|{Hero.he} was still awake].
- "[I can not sleep|Sleep does not come|I am wide awake]," {hero} @said to {hero.his} {family}. "[Count sheep|Count a hundred
  things|Think of something nice]," @said {family.call}[| @how].
- So {hero} counted: @mood.a @beast with @color.a @odds, @mood.a @beast with @nice.a @odds, @mood.a @beast with @color.a @odds.
- {Hero} {kind.went} to the window. Outside, {creature.a} was @doing. "[Why are you awake|Can you not sleep either|Are you awake
  too], {creature}?" @asked {hero}.
/ "I [work|sing|hunt|walk] at night and sleep all day," @said the {creature}. "[Do you know|Let me tell you] how others sleep?
  @Mood.a @beast sleeps in @nice.a @odds. And @mood.a @beast sleeps on one leg."
- {Hero} tried to sleep [on one leg|like that]. {Hero.he} [fell over|wobbled|bumped into the wall] and {hero.his} {family} came.
  "[What was that|What are you doing|Are you hurt]?" {family.he} @asked.
- "The {creature} said that others sleep on one leg," @said {hero}[| @how]. {Family.call} [laughed|smiled|shook {family.his}
  head]. "[But you are|You are] {kind.a}. You sleep best in {kind.home}, with {gift.a} beside you and @color.a blanket."
- {Family.call} sang about @mood.a @beast and @mood.a @beast. {Hero} [yawned|blinked|closed {hero.his} eyes]. Before the song
  was over, {hero.he} [slept|was asleep|was dreaming].
- The moral of the story is that {moral}. || In the morning, {hero} knew that {moral}.

== the train ride
cast: child animal
morals: the way can be better than the goal|a friendly word makes the time fly|strangers are friends you do not know yet|it is
    good to look out of the window
/ @When, {hero} and {hero.his} {family} took the train to {land}. @Bag. {Family} had @nice.a @odds and {food2.a}.
- {Hero} looked out of the window. There was @mood.a @beast @doing, and then {landmark.a}, and behind it @mood.a @beast. "[Are
  we there yet|How long is it|When will we be there]?" {hero} @asked. "[Not yet|Soon|It is still far]," @said {family.call}[2*|
  @how].
- In [the next seat|the corner|seat seven] sat @mood.a {kind2} with @color.a @odds. "[Is this seat free|Hello|Good @day]," @said
  {hero}[| @how]. "[I am going|We are going] to {land}." "I am {friend}. I am going to {land2}," @said the {kind2}.
- "What is in {land2}?" @asked {hero}. "[There they have|They have|You can see] @color @beast_many and the biggest {landmark2}
  in the world," @said {friend}[| @how]. "[My {family2} lives there|I was born there]."
/ They played {game} and [shared|ate] the {food}. || They played {game}, and {hero} gave {friend} half of the {food}.
- {Friend} showed {hero} how to draw {creature.a}.
- "[Next stop|Here is|This is] {land2}!" [called|cried] the conductor. {Friend} [took|picked up] {friend.his} bag.
  "[Goodbye|Farewell|It was so nice], {hero}. [Take this|This is for you]!" It was {gift.a}.
- In {land} they [visited|saw|went to] {landmark3.a}. But best of all {hero} remembered {friend} and the {creature}.
- @Lesson.
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
