// SPDX-License-Identifier: Apache-2.0
//
// As ask.py: asks a database through JDBC again and again, and writes a line for each question.
//
// Query URL
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;

public class Query {
    private static final int PAUSE = 5; // milliseconds
    private static final int LONGEST = 110; // characters

    public static void main(String[] arguments) throws InterruptedException {
        Connection connection = null;
        for (int number = 1;; number++) {
            Thread.sleep(PAUSE);
            try {
                if (connection == null) {
                    connection = DriverManager.getConnection(arguments[0]);
                }
                try (Statement statement = connection.createStatement();
                        ResultSet result = statement.executeQuery("select " + number)) {
                    result.next();
                    tell(result.getInt(1) == number ? "ok" : "a wrong answer");
                }
            } catch (SQLException complaint) {
                tell(complaint.getClass().getSimpleName() + ": " + complaint.getMessage().replaceAll("\\s+", " "));
                connection = null;
            }
        }
    }

    private static void tell(String what) {
        System.out.println("= " + what.substring(0, Math.min(what.length(), LONGEST)));
        System.out.flush();
    }
}
