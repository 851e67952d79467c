<?php
// SPDX-License-Identifier: Apache-2.0
// A MariaDB client on mysqlnd: rows in and out on one connection. mysqli.php ADDRESS PORT USER ROUNDS
mysqli_report(MYSQLI_REPORT_ERROR | MYSQLI_REPORT_STRICT);
[, $address, $port, $user, $rounds] = $argv;
$database = new mysqli($address, $user, '', 'apps', (int) $port);
$database->query('create table php (n int primary key, t mediumblob)');
$insert = $database->prepare('insert into php values (?, ?)');
$select = $database->prepare('select t from php where n = ?');
$wrong = 0;
$sum = hash_init('sha256');
for ($n = 0; $n < (int) $rounds; $n++) {
    $text = str_repeat(md5((string) $n), 1 + $n * $n % 700);
    $insert->bind_param('is', $n, $text);
    $insert->execute();
    $select->bind_param('i', $n);
    $select->execute();
    $found = $select->get_result()->fetch_row()[0];
    $wrong += $found !== $text;
    hash_update($sum, $found);
}
$all = $database->query('select count(*), sum(length(t)) from php')->fetch_row();
echo json_encode(['wrong' => $wrong, 'rows' => $all, 'sum' => hash_final($sum)]);
