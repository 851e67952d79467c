<?php
// SPDX-License-Identifier: Apache-2.0
// A page as shops and magazines have them: a session and a fragment from Redis, some queries to MariaDB, all of
// it over connections that are kept. FASTCGI parameters name the two.
mysqli_report(MYSQLI_REPORT_ERROR | MYSQLI_REPORT_STRICT);

$redis = new Redis();
$redis->pconnect($_SERVER['REDIS'], 6379);
$db = new mysqli('p:' . $_SERVER['MARIADB'], 'stack', 'stack', 'stack', 3306);
$id = (int) ($_GET['id'] ?? 1);

function list_rows(mysqli $db, string $query, int ...$values): array
{
    return $db->execute_query($query, $values)->fetch_all(MYSQLI_ASSOC);
}

function render(array $rows): string
{
    $html = '';
    foreach ($rows as $row) {
        $html .= '<li>' . htmlspecialchars(implode(', ', $row)) . "</li>\n";
    }
    return "<ul>\n$html</ul>\n";
}

header('Content-Type: text/html; charset=utf-8');
$session = json_decode($redis->get("session:$id"), true);
echo '<html><body><h1>', htmlspecialchars($session['name']), "</h1>\n";
if ($_GET['kind'] === 'report') {
    // Much at once.
    echo render(list_rows($db, 'select * from comments where id between ? and ? + 299', $id, $id));
} else {
    $fragment = $redis->get("php:$id");
    // Three in ten fragments have expired.
    if ($fragment === false || mt_rand(1, 10) <= 3) {
        $fragment = render(list_rows($db, 'select title, body from articles where id = ?', $id))
            . render(list_rows($db, 'select author, said from comments where article = ? limit 20', $id))
            . render(list_rows($db, 'select id, title from articles where topic = ? % 40 limit 15', $id));
        $redis->setex("php:$id", 600, $fragment);
    }
    $redis->incr("views:$id");
    $user = list_rows($db, 'select * from users where id = ?', $id);
    $cart = list_rows($db, 'select * from carts where user = ? limit 10', $id);
    echo $fragment, render($user), render($cart);
}
echo '</body></html>';
